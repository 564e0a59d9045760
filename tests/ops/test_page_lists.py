import pytest
import torch
from ops.paged import make_case, make_shape

pytest.importorskip("triton")


def test_lists_follow_tables_and_lengths(device):
    from hornbeam.ops.attention.page_lists import PageLists

    bounds = [1, 16, 17, 500, 160]
    case = make_case(make_shape(device, torch.float32, 1, 1, 16), bounds, [1] * 5, num_padding=2)
    lists = PageLists(case.shape, max_rows=8)
    indptr, last_page_lens = lists.bounds(case.rows.len_bounds)
    num_pages = [1, 1, 2, 32, 10, 1, 1]
    assert indptr.diff().tolist() == num_pages
    assert last_page_lens.tolist() == [1, 16, 1, 4, 16, 1, 1]

    lists.indptr[: len(indptr)].copy_(indptr)
    case.rows.lens[4] -= 3  # the device knows better
    lists.fill(case.rows)
    assert lists.last_page_lens.tolist() == [1, 16, 1, 4, 13, 1, 1, 1]
    tables = [case.rows.page_tables[slot] for slot in case.rows.slots.tolist()]
    expected = [page for table, count in zip(tables, num_pages, strict=True) for page in table[:count].tolist()]
    assert lists.indices[: sum(num_pages)].tolist() == expected


def test_lists_leave_out_what_lies_behind_the_window(device):
    from hornbeam.ops.attention.page_lists import PageLists

    case = make_case(make_shape(device, torch.float32, 1, 1, 16, window=20), [1, 20, 36, 300], [1, 1, 3, 40])
    lists = PageLists(case.shape, max_rows=8)
    len_bounds, skips = lists.window(case.rows)
    assert skips.tolist() == [0, 0, 0, (300 - 40 - 20 + 1) // 16]
    assert len_bounds.tolist() == [1, 20, 36, 300 - 15 * 16]
    indptr, _ = lists.bounds(len_bounds)
    lists.indptr[: len(indptr)].copy_(indptr)
    lists.fill(case.rows, skips)
    assert lists.last_page_lens.tolist()[:4] == [1, 4, 4, 12]
    table = case.rows.page_tables[case.rows.slots[3]]
    assert lists.indices[indptr[3] : indptr[4]].tolist() == table[15:19].tolist()
