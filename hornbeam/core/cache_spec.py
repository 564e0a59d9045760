"""What a group of layers keeps per token, declared by the family and merged by the core."""

from dataclasses import dataclass
from typing import Literal

CacheKind = Literal["full", "window", "compressed", "state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """One cache group: layers that share page numbers and a row format.

    full: every token's row stays; window: only the last `window` rows are ever read; compressed: one row for
    `tokens_per_row` tokens; state: one row per request, reusable only at snapshots.
    """

    kind: CacheKind
    layers: tuple[int, ...]
    row_shapes: tuple[tuple[int, ...], ...]  # per tensor, one token: ((kv_heads, head_dim),) * 2 for keys and values
    dtype: str  # "float32", "bfloat16", ...
    tokens_per_row: int = 1
    window: int | None = None
    reuse_granularity: int = 1  # prefix hits end at multiples of this many tokens, besides the page size
    snapshot: bool = False  # state only: rows can be saved at page borders and restored
    sharding: Literal["heads", "replicated"] = "heads"

    def __post_init__(self) -> None:
        assert (self.kind == "window") == (self.window is not None), "window and kind belong together"

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token takes in all layers of the group."""
        row = sum(_product(shape) for shape in self.row_shapes)
        return len(self.layers) * row * itemsize // self.tokens_per_row


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
