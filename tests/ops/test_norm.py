import pytest
import torch
from ops.closeness import assert_close

pytest.importorskip("triton")

from hornbeam.ops.norm.reference import ReferenceNorm


@pytest.mark.parametrize("size", [64, 576, 4096])
@pytest.mark.parametrize("wide", [False, True])
def test_rms_norm(device, dtype, size, wide):
    from hornbeam.ops.norm.triton import BACKEND

    x = torch.randn(5, size + 32, device=device).to(dtype)[:, :size]
    weight = torch.randn(size, device=device).to(torch.float32 if wide else dtype)
    assert_close(BACKEND.rms_norm(x, weight, 1e-5), ReferenceNorm().rms_norm(x, weight, 1e-5))


def test_add_rms_norm_adds_in_place(device, dtype):
    from hornbeam.ops.norm.triton import BACKEND

    x, residual = (torch.randn(3, 576, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(576, device=device).to(dtype)
    expected_residual = residual.clone()
    expected = ReferenceNorm().add_rms_norm(x, expected_residual, weight, 1e-5)
    assert_close(BACKEND.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert_close(residual, expected_residual)


@pytest.mark.parametrize("num_parts", [1, 4])
def test_parts_are_added_up_and_rounded_once(device, dtype, num_parts):
    from hornbeam.ops.norm.triton import BACKEND

    parts = torch.randn(num_parts, 3, 576, device=device)
    residual, weight = torch.randn(3, 576, device=device).to(dtype), torch.randn(576, device=device).to(dtype)
    expected_residual = (parts.double().sum(0) + residual.double()).to(dtype)
    for backend in (BACKEND, ReferenceNorm()):
        total = residual.clone()
        out = backend.add_rms_norm(parts, total, weight, 1e-5)
        assert_close(total, expected_residual)
        assert out.dtype == dtype
        assert_close(out, ReferenceNorm().rms_norm(expected_residual, weight, 1e-5))
