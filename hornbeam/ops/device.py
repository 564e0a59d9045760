"""What backends written for one kind of device answer when asked about another, and how much of it there is."""

from functools import cache

import torch

from hornbeam.ops.query import OpQuery


def needs_cuda(query: OpQuery) -> str | None:
    """None on a CUDA device, else the reason for `supports`."""
    return None if query.device == "cuda" else "needs a CUDA device"


def needs_cpu(query: OpQuery) -> str | None:
    """None on a CPU, else the reason for `supports`."""
    return None if query.device == "cpu" else "needs a CPU"


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; of another, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
