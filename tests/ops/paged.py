"""A paged cache with rows in it, for tests of attention backends."""

from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from torch import Tensor

from hornbeam.ops.attention.contract import AttentionShape, Rows
from hornbeam.ops.attention.reference import ReferenceAttention

PAGE_SIZE = 16
MAX_PAGES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCase:
    """Rows of random lengths over random pages, and queries for them."""

    shape: AttentionShape
    rows: Rows
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor


def make_shape(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=PAGE_SIZE,
        max_pages=MAX_PAGES,
        scale=head_dim**-0.5,
        window=window,
        soft_cap=soft_cap,
        dtype=dtype,
        device=device,
    )


def make_case(
    shape: AttentionShape, lens: list[int], query_lens: list[int], *, num_padding: int = 0, captured: bool = False
) -> PagedCase:
    """Queries are a view of a wider tensor, as a fused projection makes them; slots are in no order.

    Padding rows sit in the last slot, with length 1 on page 0. What a windowed table says behind the window is the
    number of a page full of nan: it was given back, and must not be read.
    """
    device, random = shape.device, Random(0)
    if device.type == "cpu" and shape.dtype != torch.float32:
        pytest.skip("in Triton's slow interpreter float32 says enough, and it cannot multiply bfloat16 matrices")
    num_slots = len(lens) + 2
    pages = list(range(1, 1 + sum(-(-length // PAGE_SIZE) for length in lens)))
    random.shuffle(pages)
    gone = len(pages) + 1
    tables = torch.zeros((num_slots + 1, shape.max_pages), dtype=torch.int32)
    slots = random.sample(range(num_slots), len(lens))
    for slot, length, num_queries in zip(slots, lens, query_lens, strict=True):
        count = -(-length // PAGE_SIZE)
        tables[slot, :count] = torch.tensor([pages.pop() for _ in range(count)])
        if shape.window is not None:
            tables[slot, : max(0, length - num_queries - shape.window + 1) // PAGE_SIZE] = gone
    slots, lens = slots + [num_slots] * num_padding, lens + [1] * num_padding
    query_lens = query_lens + [1] * num_padding
    size = (gone + 1, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
    k_pages, v_pages = (torch.randn(size, device=device).to(shape.dtype) for _ in "kv")
    k_pages[gone] = v_pages[gone] = float("nan")
    wide = torch.randn(sum(query_lens), shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim, device=device)
    rows = Rows(
        page_tables=tables.to(device),
        slots=torch.tensor(slots, device=device),
        lens=torch.tensor(lens, dtype=torch.int32, device=device),
        len_bounds=lens,
        query_lens=query_lens,
        captured=captured,
    )
    q = wide.to(shape.dtype)[:, : shape.num_heads]
    return PagedCase(shape=shape, rows=rows, q=q, k_pages=k_pages, v_pages=v_pages)


def expected_output(case: PagedCase, sinks: Tensor | None = None) -> Tensor:
    """The reference's answer in float64, [T, Hq, D]: no backend computes more exactly."""
    wide = (tensor.double() for tensor in (case.q, case.k_pages, case.v_pages))
    attend = ReferenceAttention(case.shape).plan_prefill(replace(case.rows, captured=False))
    return attend(*wide, sinks)


def as_recorded(case: PagedCase, num_rows: int, before: int, after: int) -> PagedCase:
    """The rows of `case` as a graph sees them: among empty rows, and with queries of nobody before and after theirs."""
    rows = case.rows
    num_unused = num_rows - len(rows.len_bounds) - 2
    tensors = {name: getattr(rows, name) for name in ("slots", "lens")}
    q = torch.randn(before + len(case.q) + after, *case.q.shape[1:], device=case.q.device).to(case.q.dtype)
    q[before : before + len(case.q)] = case.q
    rows = replace(
        rows,
        len_bounds=[0, *rows.len_bounds, *[0] * num_unused, 0],
        query_lens=[before, *rows.query_lens, *[0] * num_unused, after],
        captured=True,
        **{name: torch.nn.functional.pad(tensor, (1, num_unused + 1)) for name, tensor in tensors.items()},
    )
    return replace(case, rows=rows, q=q)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """What the format of the result, and of the weights of the keys, leaves."""
    return {
        torch.float32: {"atol": 2e-6, "rtol": 2e-5},
        torch.float16: {"atol": 2e-3, "rtol": 2e-3},
        torch.bfloat16: {"atol": 1.6e-2, "rtol": 1.6e-2},
    }[dtype]
