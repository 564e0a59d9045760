"""Devices on which kernels are compared with their references.

Where there is no GPU, Triton's kernels run in its interpreter, on CPU tensors: the variable must be set before any of
them is imported. Where there is one they are compiled, which the interpreter excludes in the same process.
"""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

DEVICES = [
    pytest.param(
        "cpu", marks=[pytest.mark.cpu, pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here, see cuda")]
    ),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")]),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tensors are; also makes draws the same on every run."""
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)
