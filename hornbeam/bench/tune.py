"""`hornbeam tune moe`: searches the tiles of a model's grouped products on the GPU at hand, and writes their table."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hornbeam.core.errors import ConfigError, HornbeamError
from hornbeam.models.index import find_family
from hornbeam.ops.moe.contract import ExpertsShape, ExpertWeights, GatedUnit
from hornbeam.ops.moe.tiles import TableKey, Tile, Tiles, default_tiles, tuned_folder, write_table
from hornbeam.weights.checkpoint import open_checkpoint

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
_REPEATS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line after `hornbeam tune`; the exit code."""
    parser = argparse.ArgumentParser(prog="hornbeam tune", description="Searches the fastest settings of kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    moe = commands.add_parser("moe", help="tiles of the products of experts")
    moe.add_argument("--model-path", type=Path, required=True, help="Folder with config.json.")
    moe.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="Default: bfloat16.")
    moe.add_argument("--output", type=Path, help="Folder for the table. Default: the cache folder, where it is found.")
    values = parser.parse_args(argv)
    try:
        print(tune_moe(values.model_path, getattr(torch, values.dtype), values.output or tuned_folder()))  # noqa: T201
    except HornbeamError as error:
        print(f"hornbeam tune: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def tune_moe(model_path: Path, dtype: torch.dtype, folder: Path) -> Path:
    """Search for each number of tokens; the table's path.

    Raises:
        ConfigError: the model has no experts, or there is no GPU.
    """
    hf_config = open_checkpoint(model_path, "dummy").hf_config
    config = find_family(hf_config).parse(hf_config)
    if config.mixture is None:
        raise ConfigError(f"{model_path} is a dense model: there is nothing to tune")
    if not torch.cuda.is_available():
        raise ConfigError("tiles are searched on a CUDA device, and there is none")
    shape = ExpertsShape(
        num_experts=config.mixture.num_experts,
        top_k=config.mixture.top_k,
        hidden_size=config.hidden_size,
        intermediate_size=config.mixture.intermediate_size,
        unit=GatedUnit(),
        dtype=dtype,
        device=torch.device("cuda"),
    )
    key = TableKey(
        num_experts=shape.num_experts,
        intermediate_size=shape.intermediate_size,
        hidden_size=shape.hidden_size,
        top_k=shape.top_k,
        device=torch.cuda.get_device_name(),
        dtype=str(dtype).removeprefix("torch."),
    )
    path = folder / key.file_name
    write_table(path, _search(shape))
    return path


def candidates(tokens_per_expert: float) -> list[Tile]:
    """Tiles worth a try."""
    narrow = tokens_per_expert <= 16
    sizes = product((32, 64, 128), (64, 128), (1, 16), (4,) if narrow else (4, 8), (3, 4) if narrow else (3,))
    return [Tile(block_n=n, block_k=k, group=g, num_warps=w, num_stages=s) for n, k, g, w, s in sizes]


def _search(shape: ExpertsShape) -> dict[int, Tiles]:
    """One product after the other, with the rows of a block as they are by default, half and double."""
    from hornbeam.ops.moe.triton import TritonExperts

    experts, inner, hidden = shape.num_experts, shape.intermediate_size, shape.hidden_size
    draw: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
    weights = ExpertWeights(
        gate_up=torch.randn(experts, 2 * inner, hidden, **draw), down=torch.randn(experts, hidden, inner, **draw)
    )
    kernel = TritonExperts(shape)
    table: dict[int, Tiles] = {}
    for num_tokens in tqdm(NUM_TOKENS, desc="Numbers of tokens"):
        x = torch.randn(num_tokens, hidden, **draw)
        ids = torch.rand(num_tokens, experts, device=shape.device).topk(shape.top_k).indices.int()
        shares = torch.ones(num_tokens, shape.top_k, device=shape.device)
        seconds = partial(_seconds, partial(kernel.run, x, shares, ids, weights))
        per_expert = num_tokens * shape.top_k / experts
        best = default_tiles(per_expert)
        for block_m in sorted({16, max(16, best.block_m // 2), best.block_m, min(128, best.block_m * 2)}):
            found = Tiles(block_m=block_m, gate_up=best.gate_up, down=best.down)
            tiles = candidates(per_expert)
            found = min((Tiles(block_m=block_m, gate_up=t, down=found.down) for t in tiles), key=seconds)
            found = min((Tiles(block_m=block_m, gate_up=found.gate_up, down=t) for t in tiles), key=seconds)
            best = min(best, found, key=seconds)
        table[num_tokens] = best
    return table


def _seconds(run: Callable[[Tiles], object], tiles: Tiles) -> float:
    """Of one run; infinite where the device lacks the shared memory for the tiles."""
    from triton.runtime.errors import OutOfResources

    try:
        run(tiles)
    except OutOfResources:
        return float("inf")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPEATS):
        run(tiles)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / _REPEATS
