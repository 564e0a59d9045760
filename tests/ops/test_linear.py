import pytest
import torch
from ops.closeness import assert_close

pytest.importorskip("triton")

from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.linear.reference import ReferenceLinear
from hornbeam.ops.norm.reference import ReferenceNorm


@pytest.mark.parametrize("num_rows", [0, 1, 2, 13])
@pytest.mark.parametrize(
    ("num_in", "num_out", "bias"),
    [(64, 96, False), (576, 1030, True), (4096, 64, False), (8704, 16, True), (8200, 7, True)],
)
def test_linear(device, dtype, num_rows, num_in, num_out, bias):
    from hornbeam.ops.linear.triton import BACKEND

    if device.type == "cpu" and dtype == torch.bfloat16 and num_rows > 1:
        pytest.skip("Triton's interpreter cannot multiply bfloat16 matrices")
    x = torch.randn(num_rows, num_in + 32, device=device).to(dtype)[:, :num_in]
    weight = torch.randn(num_out, num_in, device=device).to(dtype) / num_in**0.5
    offset = torch.randn(num_out, device=device).to(dtype) if bias else None
    out, expected = BACKEND.linear(x, weight, offset), ReferenceLinear().linear(x, weight, offset)
    if dtype == torch.float16:  # thousands of terms in another order
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=2e-3)
    else:
        assert_close(out, expected)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 70])
@pytest.mark.parametrize("num_in", [200, 1024, 3072, 4096])  # all but the first are cut into stretches
@pytest.mark.parametrize("narrow", [False, True])
def test_wide(device, dtype, num_rows, num_in, narrow):
    """Weights of float32 keep digits that half precision has not, and so do all results."""
    from hornbeam.ops.linear.triton import BACKEND

    if device.type == "cpu" and dtype == torch.bfloat16 and num_rows > 1 and narrow:
        pytest.skip("Triton's interpreter cannot multiply bfloat16 matrices")
    x = torch.randn(num_rows, num_in, device=device).to(dtype)
    weight = (torch.randn(70, num_in, device=device) / num_in**0.5).to(dtype if narrow else torch.float32)
    out = BACKEND.wide(x, weight)
    out = out.sum(0) if out.ndim == 3 else out
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, (x.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("num_in", "num_out", "bias"), [(64, 96, False), (576, 1030, True), (8704, 16, True)])
def test_normed(device, dtype, num_in, num_out, bias, added, gated):
    from hornbeam.ops.linear.triton import BACKEND

    x, residual = (torch.randn(1, num_in, device=device).to(dtype) for _ in "xr")
    weight = torch.randn(num_out, num_in, device=device).to(dtype) / num_in**0.5
    offset = torch.randn(num_out, device=device).to(dtype) if bias else None
    norm = InputNorm(weight=torch.rand(num_in, device=device).to(dtype) + 0.5, eps=1e-5)
    arguments = x, residual if added else None, norm, weight, offset
    before = x.clone(), residual.clone()
    out, total = BACKEND.normed(*arguments, gated=gated)
    expected, expected_total = ReferenceLinear().normed(*arguments, gated=gated)
    assert_close(total, expected_total)
    if dtype == torch.float32:
        assert_close(out, expected)
    else:  # the reference rounds after the norm, too
        torch.testing.assert_close(out, expected, rtol=4e-2, atol=4e-2)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("num_rows", [1, 13, 24])
def test_the_library_adds_the_residual(tmp_path, monkeypatch, num_rows):
    from hornbeam.ops.linear.triton import TritonLinear

    monkeypatch.setenv("HORNBEAM_CACHE_DIR", str(tmp_path))
    x, residual = (torch.randn(num_rows, 512, device="cuda", dtype=torch.bfloat16) for _ in "xr")
    weight = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) / 512**0.5
    expected = (x.float() @ weight.float().T + residual.float()).to(torch.bfloat16)
    product = TritonLinear()
    product.prepare([weight], [24])
    out, left = product.added(x, weight, None, residual)
    assert (left is None) == (out is residual)
    if left is not None:
        assert left is residual
        ReferenceNorm().add_rms_norm(out, residual, torch.ones_like(residual[0]), 1e-5)
    torch.testing.assert_close(residual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("num_in", "num_out", "bias"), [(64, 96, False), (576, 1030, True)])
def test_gated_without_a_norm(device, dtype, num_in, num_out, bias):
    from hornbeam.ops.linear.triton import BACKEND

    x = torch.randn(1, num_in, device=device).to(dtype)
    weight = torch.randn(num_out, num_in, device=device).to(dtype) / num_in**0.5
    offset = torch.randn(num_out, device=device).to(dtype) if bias else None
    out, total = BACKEND.normed(x, None, None, weight, offset, gated=True)
    expected, _ = ReferenceLinear().normed(x, None, None, weight, offset, gated=True)
    assert torch.equal(total, x)
    if dtype == torch.float32:
        assert_close(out, expected)
    else:  # the reference rounds gates, too
        torch.testing.assert_close(out, expected, rtol=4e-2, atol=4e-2)
