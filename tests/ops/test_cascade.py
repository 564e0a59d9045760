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


def own_parts(case: PagedCase) -> tuple[torch.Tensor, torch.Tensor]:
    """What each row's keys after the shared ones give, and their log-sum-exps to base 2."""
    shape, rows = case.shape, case.rows
    skips = [0] * len(rows.slots)
    for group in rows.shared:
        for row in group.rows:
            skips[row] = group.num_tokens
    outs, sums = [], []
    for row, (slot, length) in enumerate(zip(rows.slots.tolist(), rows.lens.tolist(), strict=True)):
        positions = torch.arange(skips[row], length)
        cells = rows.page_tables[slot].cpu()[positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        k, v = (pages.flatten(0, 1)[cells].float() for pages in (case.k_pages, case.v_pages))
        heads = shape.num_heads // shape.num_kv_heads
        scores = torch.einsum("hd,thd->ht", case.q[row].float(), k.repeat_interleave(heads, 1)) * shape.scale
        outs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v.repeat_interleave(heads, 1)))
        sums.append(scores.logsumexp(-1) / torch.log(torch.tensor(2.0)))
    return torch.stack(outs).to(case.q.dtype), torch.stack(sums)


GROUPS = [
    [],
    [SharedPrefix(rows=(0, 2, 4), num_tokens=64), SharedPrefix(rows=(1, 5), num_tokens=16)],
    [SharedPrefix(rows=(0, 1, 2, 3, 4, 5), num_tokens=320)],
]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 2), (6, 2), (80, 1)])
def test_merged_parts(device, num_heads, num_kv_heads):
    from hornbeam.ops.attention.cascade import Cascade

    shape = make_shape(device, torch.float32, num_heads, num_kv_heads, 16)
    cascade = Cascade(shape, max_rows=8, num_programs=4 * num_kv_heads)
    for groups in (*GROUPS, GROUPS[0]):
        case = share(make_case(shape, [330, 400, 321, 339, 500, 350], [1] * 6, num_padding=2), groups)
        cascade.plan(case.rows.shared)
        own_lens = torch.tensor(cascade.own_lens(case.rows.len_bounds))
        skips = cascade.skips.cpu() * PAGE_SIZE
        assert torch.equal(own_lens + skips, case.rows.lens.cpu())
        out = cascade.attend(case.rows, case.q, case.k_pages, case.v_pages, *own_parts(case))
        torch.testing.assert_close(out.double(), expected_output(case), **tolerance(torch.float32))


def test_triton_with_shared_prefixes(device):
    from hornbeam.ops.attention.triton import BACKEND

    shape = make_shape(device, torch.float32, 4, 2, 32)
    attention = BACKEND.create(shape, 8)
    for groups in GROUPS:
        case = share(make_case(shape, [330, 400, 321, 339, 500, 350], [1] * 6, num_padding=2, captured=True), groups)
        out = attention.plan_decode(case.rows)(case.q, case.k_pages, case.v_pages)
        torch.testing.assert_close(out.double(), expected_output(case), **tolerance(torch.float32))


@pytest.mark.cpu
def test_work_fits_its_list_however_rows_are_grouped():
    from hornbeam.ops.attention.cascade import Cascade

    shape: AttentionShape = make_shape(torch.device("cpu"), torch.float32, 8, 2, 16)
    for num_rows in (2, 3, 64, 65, 256):
        for group_len in (2, 3, 17, 64):
            cascade = Cascade(shape, max_rows=num_rows, num_programs=64)
            starts = range(0, num_rows - 1, group_len)
            groups = [tuple(range(start, min(start + group_len, num_rows))) for start in starts]
            cascade.plan([SharedPrefix(rows=rows, num_tokens=4096) for rows in groups if len(rows) > 1])
            assert cascade.own_lens([5000] * num_rows).min() == 904


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("default")  # what other packages warn of on import is their business
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 8, 128), (9, 3, 64)], ids=str)
def test_flashinfer_with_shared_prefixes(heads):
    flashinfer = pytest.importorskip("hornbeam.ops.attention.flashinfer")
    torch.manual_seed(0)
    shape = make_shape(torch.device("cuda"), torch.bfloat16, *heads)
    attention = flashinfer.BACKEND.create(shape, 8)
    for captured in (False, True):
        for groups in GROUPS:
            lens = [330, 400, 321, 339, 500, 350]
            case = share(make_case(shape, lens, [1] * 6, num_padding=2, captured=captured), groups)
            out = attention.plan_decode(case.rows)(case.q, case.k_pages, case.v_pages)
            torch.testing.assert_close(out.double(), expected_output(case), **tolerance(torch.bfloat16))
