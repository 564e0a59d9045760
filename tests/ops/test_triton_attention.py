import dataclasses

import pytest
import torch
from ops.paged import as_recorded, expected_output, make_case, make_shape, tolerance

pytest.importorskip("triton")

SHAPES = [(9, 3, 64), (8, 2, 128), (4, 4, 16)]


# What sets attention apart from plain causal one: window, soft cap, whether heads have sinks
KINDS = [(20, None, False), (1, None, True), (100, 5.0, False), (None, 5.0, True)]


def check(case, attend, sinks=None):
    out = attend(case.q, case.k_pages, case.v_pages, sinks)
    assert out.dtype == case.q.dtype
    torch.testing.assert_close(out.double(), expected_output(case, sinks), **tolerance(case.q.dtype))


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


def test_many_parts_of_a_row_are_merged(device):
    from hornbeam.ops.attention.balanced import BalancedDecode

    case = make_case(make_shape(device, torch.float32, 8, 1, 256), [511, 30], [1, 1])
    check(case, BalancedDecode(case.shape, 8, num_processors=20).plan(case.rows))


def test_decode_with_several_queries_per_row(device, dtype):
    case = make_case(make_shape(device, dtype, 6, 2, 64), [3, 130, 66], [3, 3, 3])
    check(case, create(case.shape, 8).plan_decode(case.rows))


@pytest.mark.parametrize(("page_size", "window"), [(1, None), (24, 70), (128, None)])
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [30, 1, 20]])
def test_pages_of_any_size(device, page_size, window, query_lens):
    """A block of keys has pieces of many pages, or is a piece of one."""
    shape = make_shape(device, torch.float32, 4, 2, 16, window=window)
    case = make_case(shape, [min(length, 32 * page_size) for length in (300, 128, 25)], query_lens)
    tables = torch.randperm(16 * 32, dtype=torch.int32).reshape(16, 32)[: len(case.rows.page_tables)].to(device)
    case = dataclasses.replace(
        case,
        shape=dataclasses.replace(shape, page_size=page_size),
        rows=dataclasses.replace(case.rows, page_tables=tables),
        k_pages=torch.randn(16 * 32, page_size, 2, 16, device=device),
        v_pages=torch.randn(16 * 32, page_size, 2, 16, device=device),
    )
    attention = create(case.shape, 8)
    check(case, (attention.plan_prefill if max(query_lens) > 1 else attention.plan_decode)(case.rows))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_captured_plan_follows_the_tensors(device, num_rows):
    """And no others: those of a rehearsal come first."""
    lens, query_lens = [40, 90][:num_rows], [1] * num_rows
    case = make_case(make_shape(device, torch.float32, 4, 2, 64), lens, query_lens, captured=True)
    attention = create(case.shape, 8)
    others = {"slots": torch.zeros_like(case.rows.slots), "lens": torch.ones_like(case.rows.lens)}
    others = dataclasses.replace(case.rows, **others)
    for plan in (attention.plan_decode, attention.plan_prefill):
        plan(others)
        attend = plan(case.rows)
        check(case, attend)
        case.rows.lens.copy_(torch.tensor([39, 3][:num_rows]))
        assert plan(case.rows) is attend
        check(case, attend)


@pytest.mark.parametrize("lens", [[40, 90, 130], [33]])
def test_empty_rows_of_a_graph_leave_what_is_there(device, lens):
    case = make_case(make_shape(device, torch.float32, 4, 2, 64), lens, [1] * len(lens), num_padding=2, captured=True)
    case.rows.lens[len(lens) :] = 0
    out = torch.full_like(case.q, 7.0)
    assert create(case.shape, 8).plan_decode(case.rows)(case.q, case.k_pages, case.v_pages, out=out) is out
    expected = expected_output(case)[: len(lens)]
    torch.testing.assert_close(out[: len(lens)].double(), expected, **tolerance(torch.float32))
    assert (out[len(lens) :] == 7.0).all()


@pytest.mark.parametrize("heads", SHAPES)
def test_prefill_after_a_cached_prefix(device, dtype, heads):
    case = make_case(make_shape(device, dtype, *heads), [70, 1, 150, 33], [70, 1, 65, 2])
    check(case, create(case.shape, 8).plan_prefill(case.rows))


@pytest.mark.parametrize("num_processors", [1, 1000])
def test_keys_are_split_where_few_tiles_would_leave_processors_idle(device, num_processors):
    from hornbeam.ops.attention.triton import TiledPrefill

    case = make_case(make_shape(device, torch.float32, 4, 2, 16), [300, 40], [10, 25])
    check(case, TiledPrefill(case.shape, num_processors).plan(case.rows))


@pytest.mark.parametrize("window", [None, 20])
def test_a_recorded_prefill_follows_new_plans(device, window):
    """Rows among empty ones: the same `attend` for as many queries in all, whosoever they are."""
    shape, attends = make_shape(device, torch.float32, 4, 1, 16, window=window), []
    attention = create(shape, 8)
    addresses = None
    for lens, query_lens, before in (([40, 300], [10, 25], 20), ([33], [2], 0), ([31, 20, 5], [31, 17, 5], 1)):
        case = make_case(shape, lens, query_lens)
        after = 64 - before - sum(query_lens)
        recorded = as_recorded(case, num_rows=6, before=before, after=after)
        rows = recorded.rows
        if addresses is None:
            addresses = rows.page_tables.new_zeros(16, rows.page_tables.shape[1]), rows.slots, rows.lens
        tables, slots, lengths = addresses
        tables[: len(rows.page_tables)] = rows.page_tables
        slots.copy_(rows.slots)
        lengths.copy_(rows.lens)
        rows = dataclasses.replace(rows, page_tables=tables, slots=slots, lens=lengths)
        attends.append(attention.plan_prefill(rows))
        out = attends[-1](recorded.q, case.k_pages, case.v_pages)
        ours = out[before : before + len(case.q)]
        torch.testing.assert_close(ours.double(), expected_output(case), **tolerance(torch.float32))
        assert not out[:before].any()
        assert not out[before + len(case.q) :].any()
    assert attends == attends[:1] * 3


@pytest.mark.parametrize(("window", "soft_cap", "has_sinks"), KINDS)
def test_windows_soft_caps_and_sinks(device, dtype, window, soft_cap, has_sinks):
    shape = make_shape(device, dtype, 6, 2, 32, window=window, soft_cap=soft_cap)
    sinks = torch.randn(6, device=device, dtype=dtype) if has_sinks else None
    attention = create(shape, 8)
    case = make_case(shape, [1, 300, 17, 64, 21], [1] * 5, num_padding=1)
    check(case, attention.plan_decode(case.rows), sinks)
    case = make_case(shape, [150, 22], [2, 2])
    check(case, attention.plan_decode(case.rows), sinks)
    case = make_case(shape, [70, 1, 150, 33], [70, 1, 65, 2])
    check(case, attention.plan_prefill(case.rows), sinks)


@pytest.mark.cpu
@pytest.mark.parametrize("head_dim", [8, 80])
def test_head_sizes_that_it_refuses(head_dim):
    from hornbeam.ops.attention.triton import BACKEND
    from hornbeam.ops.query import OpQuery

    query = OpQuery(device="cuda", dtype="bfloat16", num_heads=4, num_kv_heads=4, head_dim=head_dim, page_size=16)
    assert "power of two" in BACKEND.supports(query)
