"""How fast a checkpoint of many files is loaded, against merely reading them, and what memory it takes meanwhile.

The checkpoint is made for the occasion and removed again. The files leave the page cache before each run.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hornbeam.core.family import Placement
from hornbeam.weights.checkpoint import open_checkpoint
from hornbeam.weights.load import load_weights

_SIDE = 4096  # of the square bfloat16 tensors, 32 MiB each
_TENSOR_BYTES = 2 * _SIDE * _SIDE
_BUFFER_BYTES = 1 << 20
_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMeasurement:
    """Sizes in bytes. `peak_memory` is resident memory beyond what was there before, the loaded weights included."""

    size: int
    largest_file: int
    read_seconds: float
    load_seconds: float
    peak_memory: int

    def lines(self) -> list[str]:
        """For people, then as JSON."""
        beyond = self.peak_memory - self.size
        values = {
            "bytes": self.size,
            "read_gb_per_second": round(self.size / self.read_seconds / 1e9, 3),
            "load_gb_per_second": round(self.size / self.load_seconds / 1e9, 3),
            "bytes_beyond_weights": beyond,
            "largest_file": self.largest_file,
        }
        return [
            f"{self.size / 2**30:.1f} GiB in files of {self.largest_file / 2**30:.1f} GiB",
            f"reading  {self.read_seconds:7.2f} s  {values['read_gb_per_second']:6.2f} GB/s",
            f"loading  {self.load_seconds:7.2f} s  {values['load_gb_per_second']:6.2f} GB/s",
            f"memory beyond the weights: at most {beyond / 2**30:.2f} GiB",
            json.dumps(values),
        ]


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench load`."""
    parser = argparse.ArgumentParser(
        prog="hornbeam bench load",
        description="Writes a checkpoint, reads its files, then loads it, each time from the disk. Default: 3 GiB.",
    )
    parser.add_argument(
        "--folder", type=Path, help="Where to write it. Default: the system's place for temporary files."
    )
    parser.add_argument("--files", type=int, default=3, help="Default: %(default)s.")
    parser.add_argument("--tensors-per-file", type=int, default=32, help="Of 32 MiB each. Default: %(default)s.")
    values = parser.parse_args(argv)
    measurement = measure_loading(values.folder, values.files, values.tensors_per_file)
    print("\n".join(measurement.lines()), flush=True)  # noqa: T201
    return 0


def measure_loading(folder: Path | None, num_files: int, tensors_per_file: int) -> LoadMeasurement:
    """Write such a checkpoint of bfloat16 under `folder` (None: the system's for temporary files), read it, load it."""
    with tempfile.TemporaryDirectory(prefix="hornbeam-load-", dir=folder) as name:
        paths = _write(Path(name), num_files, tensors_per_file)
        _leave_page_cache(paths)
        started = time.perf_counter()
        _read(paths)
        read_seconds = time.perf_counter() - started
        _leave_page_cache(paths)
        checkpoint = open_checkpoint(Path(name))
        model = nn.ParameterDict()
        peak: list[int] = []
        with _watched_memory(peak):
            started = time.perf_counter()
            for tensor in checkpoint.source.shapes():
                empty = torch.empty(_SIDE, _SIDE, dtype=torch.bfloat16)
                model[tensor] = nn.Parameter(empty, requires_grad=False)
            load_weights(model, checkpoint, {tensor: Placement(parameter=tensor) for tensor in model})
            load_seconds = time.perf_counter() - started
        return LoadMeasurement(
            size=len(model) * _TENSOR_BYTES,
            largest_file=max(path.stat().st_size for path in paths),
            read_seconds=read_seconds,
            load_seconds=load_seconds,
            peak_memory=max(peak),
        )


def _write(folder: Path, num_files: int, tensors_per_file: int) -> list[Path]:
    (folder / "config.json").write_text("{}")
    tensor = torch.randn(_SIDE, _SIDE).bfloat16()
    paths: list[Path] = []
    index: dict[str, str] = {}
    for number in range(num_files):
        paths.append(folder / f"model-{number + 1:05}-of-{num_files:05}.safetensors")
        names = [f"w{number}_{i}" for i in range(tensors_per_file)]
        save_file({name: tensor.clone() for name in names}, paths[-1])
        index |= dict.fromkeys(names, paths[-1].name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return paths


def _read(paths: list[Path]) -> None:
    buffer = bytearray(_BUFFER_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _leave_page_cache(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _watched_memory(peak: list[int]) -> Iterator[None]:
    """Adds to `peak`, time and again, by how much resident memory has grown since the start, in bytes."""
    before, over = _resident_bytes(), threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            peak.append(_resident_bytes() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        peak.append(_resident_bytes() - before)
        over.set()
        watcher.join()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
