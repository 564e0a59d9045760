"""How kernels are launched: on how many multiprocessors, and early.

Programmatic dependent launch: a kernel may begin before the one ahead of it has ended.

A kernel launched so first does what needs nothing of its predecessors (addresses, weights), then waits for them with
`tl.extra.cuda.gdc_wait()`, and tells its successor to begin with `gdc_launch_dependents()`. Since every kernel waits
before it reads or writes what others touch, order is kept through any number of kernels. What kernels of another kind
wrote for the step (lengths, page tables) can be read without waiting: they were over before the first of ours began.
Short kernels tell their successors before they wait themselves, so that several stand ready; behind long ones, which
fill the device, those would be in the way. Hopper and later.
"""

from functools import cache
from typing import Any

import torch


@cache
def early_launch(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a Triton launch whose kernel has the constexpr EARLY."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; of another, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
