"""Every backend of every op over a grid of shapes: is it right, how long does it take, how far is that from the limit.

A limit is the larger of the bytes that must move and of the operations, at the rates that a read and a square product
reach on this machine. Right is what agrees with the op's reference in float32, as far as the format allows.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from hornbeam.bench.kernel_cases import CASES
from hornbeam.bench.kernel_shapes import Case, ModelShape, read_shape
from hornbeam.bench.report import append_json, show
from hornbeam.core.errors import ConfigError
from hornbeam.platforms.contract import Platform
from hornbeam.platforms.index import PLATFORMS

T = TypeVar("T")

_ROW = "{:<20} {:<10} {:<30} {:>11} {:>9} {:>9} {:>7} {:>8}"
_TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # of the largest value
_NUM_RUNS = 15
_FLUSH_BYTES = 256 * 2**20  # moved before each run, so that a GPU's cache holds nothing of the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine reaches: bytes and floating-point operations per second."""

    bandwidth: float
    products: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMeasurement:
    """One backend on one shape."""

    op: str
    backend: str
    shape: str
    seconds: float
    num_bytes: int
    num_flops: int
    limit: float  # seconds
    error: float  # largest deviation, as a share of the largest value
    right: bool

    def line(self) -> str:
        """For people."""
        share = f"{self.limit / self.seconds:.0%}"
        sizes = f"{self.num_bytes / 2**20:.1f}", f"{self.num_flops / 1e9:.1f}"
        verdict = "" if self.right else "WRONG"
        return _ROW.format(self.op, self.backend, self.shape, f"{self.seconds * 1e6:.1f}", *sizes, share, verdict)


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench kernels`; 1 if a backend is wrong."""
    parser = argparse.ArgumentParser(prog="hornbeam bench kernels", description=__doc__)
    parser.add_argument(
        "--model-path", type=Path, required=True, help="A folder with config.json: only its sizes count."
    )
    parser.add_argument("--dtype", choices=_TOLERANCES, help="Default: bfloat16 on a GPU, float32 on a CPU.")
    parser.add_argument(
        "--op", nargs="+", choices=CASES, metavar="OP", help=f"Default: those of the model. {', '.join(CASES)}"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 256], help="Tokens of a step.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Append JSON lines to it.")
    arguments = parser.parse_args(argv)
    platform = PLATFORMS.choose(None).value.create()
    is_gpu = platform.device.type == "cuda"
    dtype = arguments.dtype or ("bfloat16" if is_gpu else "float32")
    shape = read_shape(arguments.model_path)
    rates = platform.submit(partial(_returned, partial(_rates, platform.device, getattr(torch, dtype)))).result()
    show(f"{platform.facts().device}: {rates.bandwidth / 1e9:.0f} GB/s, {rates.products / 1e12:.2f} TFLOP/s in {dtype}")
    show(_ROW.format("op", "backend", "shape", "us", "MiB", "GFLOP", "limit", ""))
    results = []
    for op in arguments.op or (op for op, cases in CASES.items() if cases.occurs(shape)):
        for measurement in _measure_op(op, shape, dtype, arguments.rows, platform, rates):
            show(measurement.line())
            results.append(asdict(measurement))
    show("\n".join(map(json.dumps, results)))
    append_json(arguments.json, results)
    return int(not all(result["right"] for result in results))


def _returned(work: Callable[[], T]) -> Callable[[], T]:
    """Work for the platform's stream; nothing is left for later."""
    result = work()
    return lambda: result


def _measure_op(
    op: str, shape: ModelShape, dtype: str, rows: Sequence[int], platform: Platform, rates: Rates
) -> Iterator[KernelMeasurement]:
    registry, make_cases = CASES[op].registry, CASES[op].make
    query = shape.query(platform.device.type, dtype)
    for name in registry.names():
        try:
            backend = registry.choose(query, name).value
        except ConfigError as error:
            show(_ROW.format(op, name, str(error).rpartition(": ")[2][:60], "", "", "", "", ""))
            continue
        for num_rows in rows:
            for case in make_cases(backend, shape, num_rows, platform.device, getattr(torch, dtype)):
                seconds, deviation = platform.submit(
                    partial(_returned, partial(_measure, case, platform.device))
                ).result()
                limit = max(case.num_bytes / rates.bandwidth, case.num_flops / (rates.products * case.speed))
                yield KernelMeasurement(
                    op=op,
                    backend=name,
                    shape=case.shape,
                    seconds=seconds,
                    num_bytes=case.num_bytes,
                    num_flops=case.num_flops,
                    limit=limit,
                    error=deviation,
                    right=deviation <= _TOLERANCES[dtype],
                )


@torch.inference_mode()
def _measure(case: Case, device: torch.device) -> tuple[float, float]:
    """Median seconds of a run, and the largest deviation from what is expected, as a share of the largest value."""
    expected = case.expected().float()
    actual = case.actual() if case.actual is not None else case.run()
    assert isinstance(actual, Tensor)
    error = ((actual.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    return median_seconds(case.run, device, captures=case.captures), error


def median_seconds(run: Callable[[], object], device: torch.device, *, captures: bool = True) -> float:
    """Of a run alone, by the device's own clock where it has one; what a GPU's cache held is gone before each."""
    if device.type != "cuda":
        return _median([_host_seconds(run) for _ in range(_NUM_RUNS)])
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for _ in range(2):
        run()
    if captures:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
        run = graph.replay
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_NUM_RUNS)]
    for begin, end in events:
        flush.zero_()
        flush.sum()  # what was just written is no longer on its way
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return _median([begin.elapsed_time(end) / 1000 for begin, end in events])


def _host_seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@torch.inference_mode()
def _rates(device: torch.device, dtype: torch.dtype) -> Rates:
    num_bytes, side = (2**30, 8192) if device.type == "cuda" else (2**28, 1024)
    source = torch.ones(num_bytes // 4, device=device)
    square: Tensor = torch.randn(side, side, device=device).to(dtype)
    read = median_seconds(source.amax, device)
    product = median_seconds(lambda: square @ square, device)
    return Rates(bandwidth=num_bytes / read, products=2 * side**3 / product)
