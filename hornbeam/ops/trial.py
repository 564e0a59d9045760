"""Trials of kernels in Gluon, a part of Triton that changes between versions: each is run and compared at start."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def serves(kernel: str, instead: str, trial: Callable[[], tuple[Tensor, Tensor]]) -> bool:
    """Whether `trial` runs, and what the kernel computes there is what was expected. If not, a warning says so.

    kernel, instead: what the warning calls the kernel, and what serves in its place.
    """
    try:
        actual, expected = trial()
        torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.02)
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        logger.warning("the kernel in Gluon for %s is left out (%s): %s", kernel, reason, instead)
        return False
    return True


def on_hopper(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device is of the generation that these kernels are for, and the numbers are of half precision."""
    halves = dtype in (torch.float16, torch.bfloat16)
    return halves and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
