import pytest
import torch
from ops.paged import expected_output, make_case, make_shape, tolerance

pytest.importorskip("triton")

SHAPES = [(9, 3, 64), (8, 2, 128), (4, 4, 16)]


def check(case, attend):
    out = attend(case.q, case.k_pages, case.v_pages)
    assert out.dtype == case.q.dtype
    torch.testing.assert_close(out.double(), expected_output(case), **tolerance(case.q.dtype))


def create(shape, max_rows):
    from hornbeam.ops.attention.triton import BACKEND

    return BACKEND.create(shape, max_rows)


@pytest.mark.parametrize("heads", SHAPES)
def test_decode(device, dtype, heads):
    case = make_case(make_shape(device, dtype, *heads), [1, 300, 17, 64], [1, 1, 1, 1], num_padding=1)
    check(case, create(case.shape, 8).plan_decode(case.rows))


def test_decode_of_one_long_row_is_split(device, dtype):
    case = make_case(make_shape(device, dtype, 4, 1, 64), [511], [1])
    check(case, create(case.shape, 8).plan_decode(case.rows))


def test_decode_with_several_queries_per_row(device, dtype):
    case = make_case(make_shape(device, dtype, 6, 2, 64), [3, 130, 66], [3, 3, 3])
    check(case, create(case.shape, 8).plan_decode(case.rows))


def test_a_captured_plan_follows_the_tensors(device):
    case = make_case(make_shape(device, torch.float32, 4, 2, 64), [40, 90], [1, 1], captured=True)
    attention = create(case.shape, 8)
    attend = attention.plan_decode(case.rows)
    check(case, attend)
    case.rows.lens.copy_(torch.tensor([39, 3]))
    assert attention.plan_decode(case.rows) is attend
    check(case, attend)


@pytest.mark.parametrize("heads", SHAPES)
def test_prefill_after_a_cached_prefix(device, dtype, heads):
    case = make_case(make_shape(device, dtype, *heads), [70, 1, 150, 33], [70, 1, 65, 2])
    check(case, create(case.shape, 8).plan_prefill(case.rows))


@pytest.mark.cpu
@pytest.mark.parametrize("head_dim", [8, 80])
def test_head_sizes_that_it_refuses(head_dim):
    from hornbeam.ops.attention.triton import BACKEND
    from hornbeam.ops.query import OpQuery

    query = OpQuery(device="cuda", dtype="bfloat16", num_heads=4, num_kv_heads=4, head_dim=head_dim, page_size=16)
    assert "power of two" in BACKEND.supports(query)
