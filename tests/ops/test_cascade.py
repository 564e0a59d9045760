"""Attention with shared prefixes read once equals attention where each row reads all of its own keys."""

import dataclasses

import pytest
import torch
from ops.paged import PAGE_SIZE, PagedCase, expected_output, make_case, make_shape, tolerance

from hornbeam.core.plan import SharedPrefix
from hornbeam.ops.attention.contract import AttentionShape

pytest.importorskip("triton")


def share(case: PagedCase, groups: list[SharedPrefix]) -> PagedCase:
    """Give the rows of each group the pages of its first row."""
    tables, slots = case.rows.page_tables.clone(), case.rows.slots.tolist()
    for group in groups:
        for row in group.rows[1:]:
            entries = group.num_tokens // PAGE_SIZE
            tables[slots[row], :entries] = tables[slots[group.rows[0]], :entries]
    return dataclasses.replace(case, rows=dataclasses.replace(case.rows, page_tables=tables, shared=groups))


GROUPS = [
    [],
    [SharedPrefix(rows=(0, 2, 4), num_tokens=64), SharedPrefix(rows=(1, 5), num_tokens=16)],
    [SharedPrefix(rows=(0, 1, 2, 3, 4, 5), num_tokens=320)],
]


def check(shape: AttentionShape, plan, groups: list[SharedPrefix], sinks: torch.Tensor | None = None) -> None:
    case = share(make_case(shape, [330, 400, 321, 339, 500, 350], [1] * 6, num_padding=2, captured=True), groups)
    out = plan(case.rows)(case.q, case.k_pages, case.v_pages, sinks)
    torch.testing.assert_close(out.double(), expected_output(case, sinks), **tolerance(shape.dtype))


@pytest.mark.parametrize(("heads", "num_processors"), [((6, 2), 1), ((4, 2), 20), ((80, 1), 4)], ids=str)
def test_shared_and_own_keys_are_merged(device, heads, num_processors):
    """Strips that hold many rows, and rows cut into many strips; groups larger than a tile."""
    from hornbeam.ops.attention.balanced import BalancedDecode

    shape = make_shape(device, torch.float32, *heads, 16)
    attention = BalancedDecode(shape, 8, num_processors)
    for groups in GROUPS[1:2] if heads[0] > 16 else (*GROUPS, GROUPS[0]):
        check(shape, attention.plan, groups)


@pytest.mark.parametrize("page_size", [1, 8])
def test_prefixes_over_smaller_pages(device, page_size):
    from hornbeam.ops.attention.balanced import BalancedDecode

    shape = make_shape(device, torch.float32, 4, 2, 16)
    case = share(make_case(shape, [330, 400, 321, 339, 500, 350], [1] * 6, captured=True), GROUPS[1])
    parts = torch.arange(PAGE_SIZE // page_size, dtype=torch.int32, device=device)
    tables = (case.rows.page_tables[:, :, None] * len(parts) + parts).flatten(1)
    pages = (tensor.reshape(-1, page_size, 2, 16) for tensor in (case.k_pages, case.v_pages))
    finer = dataclasses.replace(shape, page_size=page_size, max_pages=tables.shape[1])
    plan = BalancedDecode(finer, 8, num_processors=4).plan
    out = plan(dataclasses.replace(case.rows, page_tables=tables))(case.q, *pages)
    torch.testing.assert_close(out.double(), expected_output(case), **tolerance(shape.dtype))


def test_triton_with_shared_prefixes_and_sinks(device, dtype):
    from hornbeam.ops.attention.triton import BACKEND

    shape = make_shape(device, dtype, 9, 3, 64)
    attention = BACKEND.create(shape, 8)
    sinks = torch.randn(9, device=device, dtype=dtype)
    for groups in GROUPS[1:]:
        check(shape, attention.plan_decode, groups, sinks)


@pytest.mark.cpu
def test_work_fits_its_lists_however_rows_are_grouped():
    from hornbeam.ops.attention.cascade import Cascade

    shape: AttentionShape = make_shape(torch.device("cpu"), torch.float32, 8, 2, 16)
    for num_rows in (2, 3, 64, 65, 256):
        for group_len in (2, 3, 17, 64):
            cascade = Cascade(shape, max_rows=num_rows, num_processors=32)
            starts = range(0, num_rows - 1, group_len)
            groups = [tuple(range(start, min(start + group_len, num_rows))) for start in starts]
            cascade.plan([SharedPrefix(rows=rows, num_tokens=4096) for rows in groups if len(rows) > 1])
            listed = cascade.tiles.reshape(-1, 6)
            used = listed[listed[:, 1] > 0]
            assert used[:, 5].sum() == sum(len(rows) for rows in groups if len(rows) > 1)
            strips, strip_len = cascade.strips[1:].reshape(-1, 2), int(cascade.strips[0])
            for strip, (tile, stop) in enumerate(strips.tolist()):
                begin = strip * strip_len
                assert stop == 0 or int(listed[tile, 0]) <= begin < min(stop, int(listed[tile, 1]))
            assert strips[:, 1].max() == used[:, 1].max()
