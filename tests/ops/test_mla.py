"""Latent attention is attention over one key-value head; its rows are normalised, turned and written in place."""

import pytest
import torch
from ops.paged import make_case, make_shape

from hornbeam.ops.attention.reference import ReferenceAttention
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.mla.reference import ATTENTION, ROWS
from hornbeam.ops.qkv.contract import Rotation
from hornbeam.ops.rope.frequencies import rope_table

pytestmark = pytest.mark.cpu

RANK, ROPE_DIM, NUM_HEADS = 32, 8, 4


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [5, 1, 17]])
def test_attention_equals_that_over_one_head(query_lens: list[int]) -> None:
    shape = make_shape(torch.device("cpu"), torch.float32, NUM_HEADS, 1, RANK + ROPE_DIM)
    case = make_case(shape, [5, 40, 33], query_lens)
    pages = case.k_pages, case.k_pages[..., :RANK]
    results = [
        attention.plan_prefill(case.rows)(case.q, *pages)
        for attention in (ATTENTION.create(shape, 3), ReferenceAttention(shape))
    ]
    torch.testing.assert_close(*results)
    assert results[0].shape == (sum(query_lens), NUM_HEADS, RANK)


def test_neighbours_turn_together_and_latents_alone_are_normalised() -> None:
    positions, rows = torch.tensor([0, 3, 11]), torch.tensor([18, 2, 5])
    q, row = torch.randn(3, NUM_HEADS, RANK + ROPE_DIM), torch.randn(3, RANK + ROPE_DIM)
    weight, pages = torch.rand(RANK), torch.zeros(2, 16, 1, RANK + ROPE_DIM)
    table = rope_table(ROPE_DIM, 100.0, None, 16)
    old_q, old_row = q.clone(), row.clone()
    ROWS.store(q, row, InputNorm(weight=weight, eps=1e-6), Rotation(table=table, positions=positions), pages, rows)

    angles = positions[:, None] * 100.0 ** -(torch.arange(0, ROPE_DIM, 2) / ROPE_DIM)
    turn = torch.polar(torch.ones_like(angles), angles)
    for new, old, by in ((row, old_row, turn), (q, old_q, turn[:, None])):
        ends = [torch.view_as_complex(x[..., RANK:].unflatten(-1, (-1, 2)).contiguous()) for x in (new, old)]
        torch.testing.assert_close(ends[0], ends[1] * by)
    torch.testing.assert_close(q[..., :RANK], old_q[..., :RANK])
    latent = old_row[:, :RANK]
    torch.testing.assert_close(row[:, :RANK], latent * weight * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt())
    assert pages.flatten(0, 2)[rows].equal(row)
    assert pages.abs().sum(-1).count_nonzero() == 3
