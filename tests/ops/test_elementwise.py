import pytest
import torch
from ops.closeness import assert_close

pytest.importorskip("triton")

from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.qkv.reference import ReferenceQkv
from hornbeam.ops.rope.frequencies import rope_table


@pytest.mark.parametrize("size", [40, 1536])
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gated_activations(device, dtype, size, name):
    from hornbeam.ops.activation.triton import BACKEND

    x = torch.randn(3, 2 * size, device=device).to(dtype) * 3
    assert_close(getattr(BACKEND, name)(x), getattr(ReferenceActivation(), name)(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "num_in", "num_out"), [(1, 64, 8), (130, 72, 272), (3000, 1024, 1416)])
def test_gates_inside_a_product(half, num_rows, num_in, num_out):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper alone")
    from hornbeam.ops.activation.gluon_gate import multiply_gated

    x = torch.randn(num_rows, num_in, device="cuda").to(half)
    weight = (torch.randn(2 * num_out, num_in, device="cuda") * num_in**-0.5).to(half)
    expected = ReferenceActivation().silu_mul(x @ weight.T)
    torch.testing.assert_close(multiply_gated(x, weight), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_long_prompts_alone_have_gates_inside_their_product(caplog):
    from hornbeam.ops.activation.triton import BACKEND

    x, weight = torch.randn(4096, 64, device="cuda").half(), torch.randn(16384, 64, device="cuda").half() / 8
    out = BACKEND.silu_mul_product(x, weight)
    if torch.cuda.get_device_capability()[0] == 9 and not caplog.records:
        torch.testing.assert_close(out, BACKEND.silu_mul(x @ weight.T), rtol=2e-2, atol=2e-2)
    else:
        assert out is None
    assert BACKEND.silu_mul_product(x[:64], weight) is None
    assert BACKEND.silu_mul_product(x.float(), weight.float()) is None


SHAPES = [(9, 3, 64, 64), (4, 4, 24, 24), (8, 1, 128, 128), (2, 2, 32, 8), (20, 10, 16, None)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "rotated"), SHAPES)
@pytest.mark.parametrize("normed", [True, False])
def test_heads_are_normalised_rotated_and_stored(device, dtype, num_heads, num_kv_heads, head_dim, rotated, normed):
    from hornbeam.ops.qkv.triton import BACKEND

    fused = torch.randn(5, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    rows = torch.tensor([17, 3, 31, 8, 0], device=device)
    norms = rotation = None
    if normed:
        query, key = (torch.rand(head_dim, device=device).to(dtype) + 0.5 for _ in "qk")
        norms = HeadNorms(query=query, key=key, eps=1e-5)
    if rotated is not None:
        positions = torch.tensor([0, 1, 63, 7, 5], device=device)
        rotation = Rotation(table=rope_table(rotated, 10000.0, None, 64).to(device), positions=positions)
    results = []
    for backend in (BACKEND, ReferenceQkv()):
        qkv = fused.clone()
        pages = [torch.zeros(4, 8, num_kv_heads, head_dim, dtype=dtype, device=device) for _ in "kv"]
        backend.store(*qkv.split((num_heads, num_kv_heads, num_kv_heads), 1), norms, rotation, *pages, rows)
        results.append((qkv, *pages))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, roundings=2)
    assert torch.equal(results[0][2].flatten(0, 1)[rows], fused[:, -num_kv_heads:])
