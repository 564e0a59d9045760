"""One row's attention from projected heads on: as writing the cache and attending to it, by the references."""

from dataclasses import replace

import pytest
import torch
from ops.paged import PAGE_SIZE, expected_output, make_case, make_shape, tolerance

from hornbeam.ops.attention.contract import StoringAttend
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.qkv.reference import BACKEND as QKV

pytest.importorskip("triton")

# Heads, key-value heads, features; the row's length; window, soft cap; norms, rotation, sinks
CASES = {
    "first token": ((8, 2, 32), 1, None, None, True, True, False),
    "plain": ((4, 4, 64), 65, None, None, False, False, False),
    "one stretch": ((6, 2, 128), 64, None, None, False, True, False),
    "long": ((9, 3, 64), 500, None, None, True, True, False),
    "window and sinks": ((6, 2, 32), 129, 20, None, False, True, True),
    "wide window": ((8, 1, 64), 300, 250, None, True, True, True),
    "soft cap": ((4, 4, 32), 290, None, 5.0, False, True, False),
    "large heads": ((2, 1, 256), 200, None, None, True, True, False),
}


@pytest.mark.parametrize("name", CASES)
def test_as_the_parts_one_by_one(device, dtype, name):
    from hornbeam.ops.attention.triton import BACKEND

    (num_heads, num_kv_heads, dim), length, window, soft_cap, has_norms, has_rotation, has_sinks = CASES[name]
    shape = make_shape(device, dtype, num_heads, num_kv_heads, dim, window=window, soft_cap=soft_cap)
    case = make_case(shape, [length], [1])
    position = length - 1
    page = case.rows.page_tables[case.rows.slots[0], position // PAGE_SIZE].long()
    cells = (page * PAGE_SIZE + position % PAGE_SIZE)[None]
    norms = rotation = sinks = None
    if has_norms:
        query, key = (torch.rand(2, dim, device=device) + 0.5).to(dtype)
        norms = HeadNorms(query=query, key=key, eps=1e-6)
    if has_rotation:
        angles = torch.randn(length, dim // 2, device=device)
        table = torch.cat((angles.cos(), angles.sin()), 1)
        rotation = Rotation(table=table, positions=torch.tensor([position], device=device))
    if has_sinks:
        sinks = torch.randn(num_heads, device=device, dtype=dtype)
    heads = torch.randn(1, num_heads + 2 * num_kv_heads, dim, device=device).to(dtype)
    parts = num_heads, num_kv_heads, num_kv_heads

    k_pages, v_pages = case.k_pages.clone(), case.v_pages.clone()
    q, k, v = heads.clone().split(parts, 1)
    QKV.store(q, k, v, norms, rotation, k_pages, v_pages, cells)
    expected = expected_output(replace(case, q=q, k_pages=k_pages, v_pages=v_pages), sinks)

    for pages in case.k_pages, case.v_pages:  # the newest token's place holds what must not be read
        pages.view(-1, num_kv_heads, dim)[cells] = torch.nan
    attend = BACKEND.create(shape, 8).plan_decode(case.rows)
    assert isinstance(attend, StoringAttend)
    before = heads.clone()
    out = attend.run(*heads.split(parts, 1), norms, rotation, cells, case.k_pages, case.v_pages, sinks)
    assert heads.equal(before)
    torch.testing.assert_close(out.double(), expected, **tolerance(dtype))
    for ours, theirs in (case.k_pages, k_pages), (case.v_pages, v_pages):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance(dtype))
    torch.testing.assert_close(attend(q, k_pages, v_pages, sinks).double(), expected, **tolerance(dtype))
