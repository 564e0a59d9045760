import pytest
import torch
from ops.closeness import assert_close

pytest.importorskip("triton")

from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.cache_write.reference import ReferenceCacheWrite
from hornbeam.ops.rope.frequencies import rope_table
from hornbeam.ops.rope.reference import ReferenceRope


@pytest.mark.parametrize("size", [40, 1536])
def test_silu_mul(device, dtype, size):
    from hornbeam.ops.activation.triton import BACKEND

    x = torch.randn(3, 2 * size, device=device).to(dtype) * 3
    assert_close(BACKEND.silu_mul(x), ReferenceActivation().silu_mul(x))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 24), (8, 1, 128)])
def test_rotate_in_place_on_views_of_a_fused_projection(device, dtype, num_heads, num_kv_heads, head_dim):
    from hornbeam.ops.rope.triton import BACKEND

    qkv = torch.randn(6, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    expected = qkv.clone()
    positions = torch.tensor([0, 1, 2, 63, 7, 5], device=device)
    table = rope_table(head_dim, 10000.0, None, 64).to(device)
    for x, rope in ((qkv, BACKEND), (expected, ReferenceRope())):
        q, k, _ = x.split((num_heads, num_kv_heads, num_kv_heads), 1)
        rope.rotate(q, k, positions, table)
    assert_close(qkv, expected)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(3, 64), (1, 24)])
def test_cache_write(device, dtype, num_heads, head_dim):
    from hornbeam.ops.cache_write.triton import BACKEND

    fused = torch.randn(5, 2 + 2 * num_heads, head_dim, device=device).to(dtype)
    _, k, v = fused.split((2, num_heads, num_heads), 1)
    rows = torch.tensor([17, 3, 31, 8, 0], device=device)
    pools = [[torch.zeros(4, 8, num_heads, head_dim, dtype=dtype, device=device) for _ in "kv"] for _ in range(2)]
    BACKEND.write(k, v, *pools[0], rows)
    ReferenceCacheWrite().write(k, v, *pools[1], rows)
    for pages, expected in zip(*pools, strict=True):
        assert torch.equal(pages, expected)
