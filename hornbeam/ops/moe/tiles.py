"""How the grouped products are cut into tiles: from a table that a search on the device has written, or by a rule.

A table is one JSON file per kernel, shape, device and dtype: for numbers of tokens, the best tiles. What
`hornbeam tune moe` has put into the cache folder goes before what comes with the package, size by size, since a search
may have been cut off.
"""

import json
import logging
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hornbeam.config.environment import read_environment
from hornbeam.core.errors import ConfigError

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "tiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What a program computes at a time, and how."""

    block_n: int
    block_k: int
    group: int  # blocks of rows that take turns over the same columns
    num_warps: int
    num_stages: int
    programs: int = 0  # per multiprocessor, which take one tile after the other; 0: a program per tile
    flatten: bool = False  # such programs load for the next tile before they store this one


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Of both products. They share the rows of a block, since they share the order of rows."""

    block_m: int
    gate_up: Tile
    down: Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class TableKey:
    """What a table is for."""

    num_experts: int
    intermediate_size: int
    hidden_size: int
    top_k: int
    device: str  # as the driver names it
    dtype: str

    @property
    def file_name(self) -> str:
        """Of the table."""
        sizes = f"E={self.num_experts},N={self.intermediate_size},K={self.hidden_size},top_k={self.top_k}"
        return f"experts,{sizes},{self.device.replace(' ', '_')},{self.dtype}.json"


class TileTable:
    """Tiles by number of tokens."""

    def __init__(self, entries: Mapping[int, Tiles], num_experts: int, top_k: int) -> None:
        """No entries: a rule decides, by the tokens that an expert gets on average."""
        self._sizes = sorted(entries)
        self._entries = entries
        self._share = top_k / num_experts
        tiles = entries.values() if entries else map(default_tiles, (1, 64, 256))
        self.untried = list(dict.fromkeys(tiles))  # whose kernels nobody has run yet

    def of(self, num_tokens: int) -> Tiles:
        """The entry of the nearest number above; of the largest, beyond that."""
        if not self._sizes:
            return default_tiles(num_tokens * self._share)
        return self._entries[self._sizes[min(bisect_left(self._sizes, num_tokens), len(self._sizes) - 1)]]


def default_tiles(tokens_per_expert: float) -> Tiles:
    """Few rows: narrow tiles, whose loads of weights are all that counts; many: large ones, which reuse them."""
    if tokens_per_expert <= 16:
        tile = Tile(block_n=64, block_k=128, group=1, num_warps=4, num_stages=3)
        return Tiles(block_m=16, gate_up=tile, down=tile)
    if tokens_per_expert <= 64:
        tile = Tile(block_n=64, block_k=64, group=1, num_warps=4, num_stages=3)
        return Tiles(block_m=64, gate_up=tile, down=tile)
    gate_up = Tile(block_n=64, block_k=64, group=1, num_warps=8, num_stages=3, programs=2)
    down = Tile(block_n=128, block_k=64, group=1, num_warps=4, num_stages=3, programs=2, flatten=True)
    return Tiles(block_m=128, gate_up=gate_up, down=down)


@cache
def load_table(key: TableKey) -> TileTable:
    """The table for `key`; if there is none, one warning that says how to make it, and the rule.

    Raises:
        ConfigError: the file is there, but is not such a table.
    """
    paths = [folder / key.file_name for folder in (SHIPPED, tuned_folder())]
    entries: dict[int, Tiles] = {}
    for path in filter(Path.exists, paths):
        entries |= read_table(path)
    if not entries:
        logger.warning(
            "no tuned tiles for %d experts of %d x %d on %s: products may be slow; "
            "hornbeam tune moe --model-path ...%s searches them",
            key.num_experts,
            key.hidden_size,
            key.intermediate_size,
            key.device,
            " --dtype float16" if key.dtype == "float16" else "",
        )
    return TileTable(entries, key.num_experts, key.top_k)


def tuned_folder() -> Path:
    """Where this machine's own tables are."""
    return read_environment().cache_dir / "tiles"


def write_table(path: Path, entries: Mapping[int, Tiles]) -> None:
    """Write `entries` as a table. Whoever reads sees the one before, or all of this."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {str(num_tokens): asdict(tiles) for num_tokens, tiles in sorted(entries.items())}
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    unfinished.replace(path)


def read_table(path: Path) -> dict[int, Tiles]:
    """The entries of a table.

    Raises:
        ConfigError: it is none.
    """
    try:
        table: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
        return {
            int(num_tokens): Tiles(
                block_m=entry["block_m"], gate_up=Tile(**entry["gate_up"]), down=Tile(**entry["down"])
            )
            for num_tokens, entry in table.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no table of tiles ({error}); delete it; hornbeam tune moe makes a new one"
        ) from error
