"""`hornbeam check-env`: versions, devices, and which backends can be used here, and why the others cannot."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hornbeam import __version__

PACKAGES = (
    *("torch", "triton", "flashinfer-python", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
    *("starlette", "uvicorn", "uvloop", "msgspec", "pyzmq", "orjson", "jinja2", "aiohttp", "matplotlib"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 0 if a platform can be used."""
    parser = argparse.ArgumentParser(prog="hornbeam check-env", description=(__doc__ or "").partition(": ")[2])
    parser.parse_args(argv)
    for line in report():
        print(line, flush=True)  # noqa: T201
    return 0


def report() -> Iterator[str]:
    """The lines: machine, packages, devices, platforms, backends."""
    yield f"hornbeam {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"{os.cpu_count()} CPUs, {_processor()}"
    yield "\npackages"
    for name in PACKAGES:
        yield f"  {name:<20} {_version(name)}"
    yield "\nplatforms, in order of preference"
    yield from _platforms()
    yield "\ndevices"
    yield from _devices()
    yield from _backends()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _platforms() -> Iterator[str]:
    from hornbeam.platforms.index import PLATFORMS

    for name in PLATFORMS.names():
        try:
            reason = PLATFORMS.load(name).supports(None)
        except Exception as error:  # a broken one is what this report is for
            reason = f"{type(error).__name__}: {error}"
        yield f"  {name:<20} {'usable' if reason is None else f'not usable: {reason}'}"


def _devices() -> Iterator[str]:
    import torch

    yield f"  torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = f"{facts.major}.{facts.minor}"
        yield f"  cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {capability}"


def _backends() -> Iterator[str]:
    """Each is tried in earnest, as at the start of an engine."""
    from hornbeam.core.errors import ConfigError
    from hornbeam.ops.activation.contract import ACTIVATION
    from hornbeam.ops.attention.contract import DECODE_ATTENTION, PREFILL_ATTENTION
    from hornbeam.ops.layout.contract import LAYOUT
    from hornbeam.ops.linear.contract import FP8_LINEAR, LINEAR
    from hornbeam.ops.norm.contract import NORM
    from hornbeam.ops.probes import Probes
    from hornbeam.ops.qkv.contract import QKV
    from hornbeam.ops.query import OpQuery
    from hornbeam.ops.sample.contract import SAMPLE
    from hornbeam.platforms.index import PLATFORMS

    facts = PLATFORMS.choose(None).value.create().facts()
    dtype = facts.dtype or "bfloat16"
    query = OpQuery(
        device=facts.name, dtype=dtype, page_size=facts.page_size, num_heads=32, num_kv_heads=8, head_dim=128
    )
    probes = Probes(query)
    yield f"\nbackends on {facts.device}, for {dtype} and heads of {query.head_dim}; the first usable one is taken"
    tried: tuple[tuple[Any, Any], ...] = (
        (ACTIVATION, probes.activation),
        (DECODE_ATTENTION, probes.decode_attention),
        (PREFILL_ATTENTION, probes.prefill_attention),
        (LAYOUT, probes.layout),
        (LINEAR, probes.linear),
        (FP8_LINEAR, probes.fp8_linear),
        (NORM, probes.norm),
        (QKV, probes.qkv),
        (SAMPLE, probes.sample),
    )
    for registry, probe in tried:
        yield f"  {registry.name}"
        for name in registry.names():
            try:
                registry.choose(query, name, probe)
            except ConfigError as error:
                yield f"    {name:<18} not usable: {str(error).partition(f'{name}: ')[2]}"
            else:
                yield f"    {name:<18} usable"


if __name__ == "__main__":
    sys.exit(main())
