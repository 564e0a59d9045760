"""`hornbeam tune moe`: searches the tiles of a model's grouped products on the GPU at hand, and writes their table."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from hornbeam.core.errors import ConfigError, HornbeamError
from hornbeam.models.index import find_family
from hornbeam.ops.moe.contract import ExpertsShape, GatedUnit
from hornbeam.ops.moe.tiles import TableKey, read_table, tuned_folder, write_table
from hornbeam.weights.checkpoint import open_checkpoint

# From coarse to fine, so that a search that is cut off leaves tiles for all kinds of steps.
NUM_TOKENS = (256, 8192, 32, 1024, 1, 128, 4096, 64, 2048, 512, 8, 16, 4, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line after `hornbeam tune`; the exit code."""
    parser = argparse.ArgumentParser(prog="hornbeam tune", description="Searches the fastest settings of kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    moe = commands.add_parser("moe", help="tiles of the products of experts; a table that is complete is kept as it is")
    moe.add_argument("--model-path", type=Path, required=True, help="Folder with config.json.")
    moe.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="Default: bfloat16.")
    moe.add_argument("--output", type=Path, help="Folder for the table. Default: the cache folder, where it is found.")
    values = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interruption from the keyboard
    try:
        print(tune_moe(values.model_path, getattr(torch, values.dtype), values.output or tuned_folder()))  # noqa: T201
    except HornbeamError as error:
        print(f"hornbeam tune: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("hornbeam tune: cut off; the same command continues where this one was", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def tune_moe(model_path: Path, dtype: torch.dtype, folder: Path) -> Path:
    """Search for each number of tokens that the table does not have yet; its path.

    The table is written after each number: what is found outlives an interruption, and another call goes on from there.

    Raises:
        ConfigError: the model has no experts, or there is no GPU; or the file at the table's path is none.
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
        fp8=config.fp8,
        dtype=dtype,
        device=torch.device("cuda"),
    )
    key = TableKey(
        num_experts=shape.num_experts,
        intermediate_size=shape.intermediate_size,
        hidden_size=shape.hidden_size,
        top_k=shape.top_k,
        device=torch.cuda.get_device_name(),
        dtype=str(shape.weight_dtype).removeprefix("torch."),
    )
    from hornbeam.bench.tile_search import TileSearch

    path = folder / key.file_name
    entries = read_table(path) if path.exists() else {}
    missing = [number for number in NUM_TOKENS if number not in entries]
    if not missing:
        return path
    search = TileSearch(shape)
    for num_tokens in tqdm(missing, desc="Numbers of tokens"):
        entries[num_tokens] = search.best(num_tokens)
        write_table(path, entries)
    return path
