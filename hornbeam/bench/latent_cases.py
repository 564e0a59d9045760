"""What `bench kernels` runs of the ops of latent attention: rows written, decode, prompts, prompts after prefixes."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hornbeam.bench.kernel_shapes import CONTEXT, PROMPT, Case, ModelShape, OpCases, num_bytes
from hornbeam.core.family import LatentSizes
from hornbeam.ops.attention.contract import AttentionBackend, AttentionShape, LatentAttend, Rows
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.mla.contract import LATENT_ATTENTION, LATENT_ROWS, LatentRows
from hornbeam.ops.mla.reference import ATTENTION as REFERENCE
from hornbeam.ops.mla.reference import ReferenceRows
from hornbeam.ops.qkv.contract import Rotation
from hornbeam.ops.rope.frequencies import rope_table

_TAIL = 64  # tokens of a prompt behind a cached prefix


def _rows(
    backend: LatentRows, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    sizes, positions = _sizes(shape), torch.arange(num_rows, device=device)
    rotation = Rotation(table=rope_table(sizes.rope_dim, 1e4, None, num_rows).to(device), positions=positions)
    norm = InputNorm(weight=torch.ones(sizes.rank, dtype=dtype, device=device), eps=1e-6)
    width = sizes.nope_dim + sizes.rope_dim
    q = torch.randn(num_rows, shape.num_heads, width, device=device).to(dtype)
    row, up = torch.randn(num_rows, shape.head_dim, device=device).to(dtype), _up(shape, device, dtype)
    num_pages = -(-num_rows // shape.page_size)
    pages = torch.zeros(num_pages, shape.page_size, 1, shape.head_dim, dtype=dtype, device=device)

    def stored(backend: LatentRows) -> Tensor:
        """Queries, and what the cache holds of the rows."""
        turned = q.clone()
        backend.store(turned, row.clone(), norm, rotation, pages, positions)
        return torch.cat((turned.flatten(1), pages.flatten(0, 2)[positions]), 1)

    def absorbed(backend: LatentRows) -> Tensor:
        """The same."""
        wide = backend.absorb(q.clone(), row.clone(), norm, rotation, pages, positions, up)
        return torch.cat((wide.flatten(1), pages.flatten(0, 2)[positions]), 1)

    spent, spent_row = q.clone(), row.clone()
    yield Case(
        shape=f"store {num_rows}x{shape.num_heads}x{width}",
        run=lambda: backend.store(spent, spent_row, norm, rotation, pages, positions),
        actual=lambda: stored(backend),
        expected=lambda: stored(ReferenceRows()),
        num_bytes=2 * num_bytes(q[..., sizes.nope_dim :], row),
    )
    keys = up[:, : sizes.nope_dim]
    yield Case(
        shape=f"absorb {num_rows}x{shape.num_heads}x{width}",
        run=lambda: backend.absorb(spent, spent_row, norm, rotation, pages, positions, up),
        actual=lambda: absorbed(backend),
        expected=lambda: absorbed(ReferenceRows()),
        num_bytes=num_bytes(q, row, row, keys) + num_rows * shape.num_heads * shape.head_dim * dtype.itemsize,
        num_flops=2 * num_rows * keys.numel(),
    )


def _attention(
    backend: AttentionBackend, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    decode = [CONTEXT] * num_rows, [1] * num_rows
    yield _attend(backend, shape, *decode, device, dtype, f"{num_rows} rows of {CONTEXT}")
    num_prompts = max(1, num_rows // 16)
    prompts = [PROMPT] * num_prompts
    yield _attend(backend, shape, prompts, prompts, device, dtype, f"{num_prompts} prompts of {PROMPT}")
    tails = [CONTEXT] * num_prompts, [_TAIL] * num_prompts
    yield _attend(backend, shape, *tails, device, dtype, f"{num_prompts}x{_TAIL} tokens to {CONTEXT}")


def _attend(
    backend: AttentionBackend,
    shape: ModelShape,
    lens: list[int],
    query_lens: list[int],
    device: torch.device,
    dtype: torch.dtype,
    name: str,
) -> Case:
    sizes = _sizes(shape)
    settings = AttentionShape(
        num_heads=shape.num_heads,
        num_kv_heads=1,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        max_pages=-(-max(lens) // shape.page_size),
        scale=(sizes.nope_dim + sizes.rope_dim) ** -0.5,
        latent=sizes,
        dtype=dtype,
        device=device,
    )
    decodes = max(query_lens) == 1
    captures = backend.captures and decodes
    rows = _planned(settings, lens, query_lens, captured=captures)
    pages = torch.randn(rows.page_tables.numel() + 1, shape.page_size, 1, shape.head_dim, device=device).to(dtype)
    row = torch.cat([_cached(rows, pages, index)[-num:] for index, num in enumerate(query_lens)])
    up = _up(shape, device, dtype)
    q = torch.randn(sum(query_lens), shape.num_heads, sizes.nope_dim + sizes.rope_dim, device=device).to(dtype)
    attention = backend.create(settings, len(lens))
    attend = attention.plan_decode(rows) if decodes else attention.plan_prefill(rows)
    assert isinstance(attend, LatentAttend)
    plain = REFERENCE.create(settings, len(lens)).plan_decode(_planned(settings, lens, query_lens, captured=False))
    assert isinstance(plain, LatentAttend)
    queries, wide = (_absorbed(q, up, sizes) if attend.absorbed else q), _absorbed(q, up, sizes)
    return Case(
        shape=f"{name}, {'absorbed' if attend.absorbed else 'expanded'}",
        run=lambda: attend.run(queries, row, pages, up),
        expected=lambda: plain.run(wide, row, pages, up),
        num_bytes=num_bytes(queries) + (sum(lens) * shape.head_dim + len(q) * up[:, :, 0].numel()) * dtype.itemsize,
        num_flops=_flops(shape, lens, query_lens, absorbed=attend.absorbed),
        captures=captures,
    )


def _flops(shape: ModelShape, lens: Sequence[int], query_lens: Sequence[int], *, absorbed: bool) -> int:
    """Of attention, and of making values of latents or keys and values of rows."""
    sizes, rows = _sizes(shape), list(zip(query_lens, lens, strict=True))
    pairs = sum(num * length - num * (num - 1) // 2 for num, length in rows)
    if absorbed:
        each = 2 * sizes.rank + sizes.rope_dim, sizes.rank * sizes.value_dim, sum(query_lens)
    else:
        made = sizes.rank * (sizes.nope_dim + sizes.value_dim)
        each = sizes.nope_dim + sizes.rope_dim + sizes.value_dim, made, sum(lens)
    width, made, num_made = each
    return 2 * shape.num_heads * (pairs * width + num_made * made)


def _planned(settings: AttentionShape, lens: list[int], query_lens: list[int], *, captured: bool) -> Rows:
    tables = torch.arange(1, len(lens) * settings.max_pages + 1, dtype=torch.int32).view(len(lens), -1)
    return Rows(
        page_tables=torch.cat((tables, torch.zeros_like(tables[:1]))).to(settings.device),
        slots=torch.arange(len(lens), device=settings.device),
        lens=torch.tensor(lens, dtype=torch.int32, device=settings.device),
        len_bounds=lens,
        query_lens=query_lens,
        fresh=not captured,
        captured=captured,
    )


def _cached(rows: Rows, pages: Tensor, index: int) -> Tensor:
    """[length, C + R], of one row."""
    cells: Tensor = pages[rows.page_tables[index].long()].flatten(0, 2)[: rows.len_bounds[index]]
    return cells


def _absorbed(q: Tensor, up: Tensor, sizes: LatentSizes) -> Tensor:
    """[T, Hq, N + R] -> [T, Hq, C + R]."""
    plain, turned = q.split((sizes.nope_dim, sizes.rope_dim), -1)
    latent = torch.bmm(plain.transpose(0, 1), up[:, : sizes.nope_dim]).transpose(0, 1)
    return torch.cat((latent, turned), -1)


def _up(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Tensor:
    sizes = _sizes(shape)
    up = torch.randn(shape.num_heads, sizes.nope_dim + sizes.value_dim, sizes.rank, device=device)
    scaled: Tensor = up * sizes.rank**-0.5
    return scaled.to(dtype)


def _sizes(shape: ModelShape) -> LatentSizes:
    assert shape.latent is not None
    return shape.latent


def _has_latents(shape: ModelShape) -> bool:
    return shape.latent is not None


LATENT_CASES: Mapping[str, OpCases] = {
    "latent_rows": OpCases(LATENT_ROWS, _rows, _has_latents),
    "latent_attention": OpCases(LATENT_ATTENTION, _attention, _has_latents),
}
