import pytest
import torch
from ops.closeness import assert_close

pytest.importorskip("triton")

from hornbeam.ops.linear.reference import ReferenceLinear


@pytest.mark.parametrize("num_rows", [0, 1, 2])
@pytest.mark.parametrize(
    ("num_in", "num_out", "bias"),
    [(64, 96, False), (576, 1030, True), (4096, 64, False), (8704, 16, True), (8200, 7, True)],
)
def test_linear(device, dtype, num_rows, num_in, num_out, bias):
    from hornbeam.ops.linear.triton import BACKEND

    x = torch.randn(num_rows, num_in + 32, device=device).to(dtype)[:, :num_in]
    weight = torch.randn(num_out, num_in, device=device).to(dtype) / num_in**0.5
    offset = torch.randn(num_out, device=device).to(dtype) if bias else None
    assert_close(BACKEND.linear(x, weight, offset), ReferenceLinear().linear(x, weight, offset))
