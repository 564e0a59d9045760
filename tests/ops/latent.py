"""Rows of latents in a paged cache, and queries for them, for tests of latent attention."""

from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from torch import Tensor

from hornbeam.core.family import LatentSizes
from hornbeam.ops.attention.contract import Attention, AttentionShape, LatentAttend, Rows

TINY = LatentSizes(rank=32, rope_dim=8, nope_dim=16, value_dim=24)
LITE = LatentSizes(rank=512, rope_dim=64, nope_dim=128, value_dim=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentCase:
    """Rows of random lengths over random pages. Queries are turned already, and what they stand for is in the cache."""

    shape: AttentionShape
    rows: Rows
    q: Tensor  # [T, Hq, N + R]
    row: Tensor  # [T, C + R]
    pages: Tensor
    up: Tensor


def latent_shape(
    device: torch.device, dtype: torch.dtype, num_heads: int, sizes: LatentSizes, page_size: int = 16
) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=sizes.rank + sizes.rope_dim,
        page_size=page_size,
        max_pages=-(-1024 // page_size),
        scale=(sizes.nope_dim + sizes.rope_dim) ** -0.5 * 1.3,
        latent=sizes,
        dtype=dtype,
        device=device,
    )


def latent_case(
    shape: AttentionShape, lens: list[int], query_lens: list[int], *, num_padding: int = 0, captured: bool = False
) -> LatentCase:
    """Padding rows sit in the last slot, with length 1 on page 0. No page but those of rows may be read: the last one,
    of which the tables are full otherwise, holds nan."""
    device, sizes, random = shape.device, shape.latent, Random(0)
    assert sizes is not None
    if device.type == "cpu" and shape.dtype != torch.float32:
        pytest.skip("in Triton's slow interpreter float32 says enough, and it cannot multiply bfloat16 matrices")
    size, num_slots = shape.page_size, len(lens) + 2
    numbers = list(range(1, 1 + sum(-(-length // size) for length in lens)))
    random.shuffle(numbers)
    pages = torch.randn(len(numbers) + 2, size, 1, shape.head_dim, device=device).to(shape.dtype)
    pages[-1] = float("nan")
    tables = torch.full((num_slots + 1, shape.max_pages), len(numbers) + 1, dtype=torch.int32)
    tables[-1] = 0
    slots = random.sample(range(num_slots), len(lens))
    for slot, length in zip(slots, lens, strict=True):
        count = -(-length // size)
        tables[slot, :count] = torch.tensor([numbers.pop() for _ in range(count)])
    slots, lens, query_lens = (
        slots + [num_slots] * num_padding,
        lens + [1] * num_padding,
        query_lens + [1] * num_padding,
    )
    rows = Rows(
        page_tables=tables.to(device),
        slots=torch.tensor(slots, device=device),
        lens=torch.tensor(lens, dtype=torch.int32, device=device),
        len_bounds=lens,
        query_lens=query_lens,
        fresh=True,
        captured=captured,
    )
    row = torch.cat([x[-num:] for x, num in zip(cached(shape, rows, pages), query_lens, strict=True)])
    q = torch.randn(sum(query_lens), shape.num_heads * (sizes.nope_dim + sizes.rope_dim) + 8, device=device)
    q = q.to(shape.dtype)[:, 8:].unflatten(1, (shape.num_heads, -1))  # a view, as a fused projection makes it
    up = torch.randn(shape.num_heads, sizes.nope_dim + sizes.value_dim, sizes.rank, device=device) * sizes.rank**-0.5
    return LatentCase(shape=shape, rows=rows, q=q, row=row, pages=pages, up=up.to(shape.dtype))


def cached(shape: AttentionShape, rows: Rows, pages: Tensor) -> list[Tensor]:
    """What the cache holds of each row, [length, C + R]."""
    return [
        pages[rows.page_tables[slot, : -(-length // shape.page_size)].long()].flatten(0, 2)[:length]
        for slot, length in zip(rows.slots.tolist(), rows.lens.tolist(), strict=True)
    ]


def expected_values(case: LatentCase) -> Tensor:
    """Each row's keys and values written out, in float64: [T, Hq, V]."""
    sizes = case.shape.latent
    assert sizes is not None
    outs = []
    for q, row in zip(
        case.q.double().split(list(case.rows.query_lens)),
        cached(case.shape, case.rows, case.pages.double()),
        strict=True,
    ):
        made = torch.einsum("kc,hfc->khf", row[:, : sizes.rank], case.up.double())
        keys = torch.cat(
            (made[..., : sizes.nope_dim], row[:, None, sizes.rank :].expand(-1, case.shape.num_heads, -1)), -1
        )
        scores = torch.einsum("qhf,khf->hqk", q, keys) * case.shape.scale
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(len(row) - len(q) + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khf->qhf", weights, made[..., sizes.nope_dim :]))
    return torch.cat(outs)


def absorbed(case: LatentCase) -> Tensor:
    """The case's queries, [T, Hq, C + R]."""
    sizes = case.shape.latent
    assert sizes is not None
    latent = torch.einsum("thn,hnc->thc", case.q[..., : sizes.nope_dim], case.up[:, : sizes.nope_dim])
    return torch.cat((latent, case.q[..., sizes.nope_dim :]), -1)


def check(case: LatentCase, attend: object) -> None:
    """A planned attention says what it should of the case."""
    assert isinstance(attend, LatentAttend)
    out = attend.run(absorbed(case) if attend.absorbed else case.q, case.row, case.pages, case.up)
    assert out.dtype == case.shape.dtype
    close(out, expected_values(case))


def close(out: Tensor, expected: Tensor) -> None:
    """To what the format of queries and results leaves."""
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if out.dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out.double(), expected, **tolerance)


def check_captured(case: LatentCase, attention: Attention) -> None:
    """A captured plan follows the tensors, and no others: those of a rehearsal come first."""
    others = {"slots": torch.zeros_like(case.rows.slots), "lens": torch.ones_like(case.rows.lens)}
    attention.plan_decode(replace(case.rows, **others))
    planned = attention.plan_decode(case.rows)
    check(case, planned)
    lens = (case.rows.lens // 2).clamp(min=1)
    case.rows.lens.copy_(lens)
    rows = replace(case.rows, len_bounds=lens.tolist())
    assert attention.plan_decode(rows) is planned
    check(replace(case, rows=rows), planned)
