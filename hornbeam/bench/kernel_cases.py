"""What `bench kernels` runs of each op that all models have; the ops of latents and of experts are told elsewhere."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from hornbeam.bench.kernel_shapes import CONTEXT, PAGE_SIZE, PROMPT, Case, ModelShape, OpCases
from hornbeam.bench.kernel_shapes import num_bytes as count_bytes
from hornbeam.bench.latent_cases import LATENT_CASES
from hornbeam.bench.mixture_cases import MIXTURE_CASES
from hornbeam.core.plan import SharedPrefix
from hornbeam.ops.activation.contract import ACTIVATION, Activation
from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.attention.contract import (
    DECODE_ATTENTION,
    PREFILL_ATTENTION,
    AttentionBackend,
    AttentionShape,
    LatentAttend,
    Rows,
)
from hornbeam.ops.attention.reference import ReferenceAttention
from hornbeam.ops.linear.contract import FP8_LINEAR, LINEAR, Fp8Product, Fp8Weight, InputNorm, LinearProduct
from hornbeam.ops.linear.fp8_reference import ReferenceFp8, round_weight
from hornbeam.ops.linear.reference import ReferenceLinear
from hornbeam.ops.norm.contract import NORM, Norm
from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.qkv.contract import QKV, HeadNorms, Qkv, Rotation
from hornbeam.ops.qkv.reference import ReferenceQkv
from hornbeam.ops.rope.frequencies import rope_table
from hornbeam.ops.sample.contract import SAMPLE, Limits, Sample
from hornbeam.ops.sample.reference import ReferenceSample


def _products(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each; of latent attention with one product for queries."""
    heads, values = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, shape.num_heads * shape.head_dim
    if (latent := shape.latent) is not None:
        heads = shape.num_heads * (latent.nope_dim + latent.rope_dim) + shape.head_dim
        values = shape.num_heads * latent.value_dim
    return {
        "qkv": (heads, shape.hidden_size),
        "output": (shape.hidden_size, values),
        "gate_up": (2 * shape.intermediate_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.intermediate_size),
    }


def _fp8_linear(
    backend: Fp8Product, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    for name, (num_out, num_in) in _products(shape).items():
        values, scales = round_weight(torch.randn(num_out, num_in, device=device), power_of_two=False)
        weight = Fp8Weight(values=values, scales=scales * num_in**-0.5, power_of_two=False)
        x = torch.randn(num_rows, num_in, device=device).to(dtype)
        yield Case(
            shape=f"{name} {num_rows}x{num_in}->{num_out}",
            run=partial(backend.linear, x, weight, None),
            expected=partial(ReferenceFp8().linear, x, weight, None),
            num_bytes=count_bytes(values, scales, x) + num_rows * num_out * dtype.itemsize,
            num_flops=2 * num_rows * num_out * num_in,
            speed=2,
        )


def _linear(
    backend: LinearProduct, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    for name, (num_out, num_in) in (_products(shape) | {"head": (shape.vocab_size, shape.hidden_size)}).items():
        weight = (torch.randn(num_out, num_in, device=device) * num_in**-0.5).to(dtype)
        x = torch.randn(num_rows, num_in, device=device).to(dtype)
        num_bytes, num_flops = (
            count_bytes(weight, x) + num_rows * num_out * dtype.itemsize,
            2 * num_rows * num_out * num_in,
        )
        yield Case(
            shape=f"{name} {num_rows}x{num_in}->{num_out}",
            run=partial(backend.linear, x, weight, None),
            expected=partial(ReferenceLinear().linear, x, weight, None),
            num_bytes=num_bytes,
            num_flops=num_flops,
        )
        if num_rows <= backend.fused_rows and name in ("qkv", "gate_up"):
            norm, gated = InputNorm(weight=torch.ones_like(x[0]), eps=1e-5), name == "gate_up"
            arguments = (x, torch.zeros_like(x), norm, weight, None)
            yield Case(
                shape=f"norm, {name} {num_rows}x{num_in}->{num_out}",
                run=partial(backend.normed, *arguments, gated=gated),
                actual=partial(_first, partial(backend.normed, *arguments, gated=gated)),
                expected=partial(_first, partial(ReferenceLinear().normed, *arguments, gated=gated)),
                num_bytes=num_bytes,
                num_flops=num_flops,
            )


def _first(call: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    return call()[0]


def _norm(backend: Norm, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    x, residual = (torch.randn(num_rows, shape.hidden_size, device=device).to(dtype) for _ in "xr")
    weight = torch.rand(shape.hidden_size, device=device).to(dtype)
    yield Case(
        shape=f"add {num_rows}x{shape.hidden_size}",
        run=lambda: backend.add_rms_norm(x, residual, weight, 1e-5),
        expected=lambda: ReferenceNorm().add_rms_norm(x, residual.clone(), weight, 1e-5),
        num_bytes=4 * count_bytes(x),
    )


def _activation(
    backend: Activation, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    x = torch.randn(num_rows, 2 * shape.intermediate_size, device=device).to(dtype)
    yield Case(
        shape=f"silu {num_rows}x{shape.intermediate_size}",
        run=lambda: backend.silu_mul(x),
        expected=lambda: ReferenceActivation().silu_mul(x),
        num_bytes=count_bytes(x) * 3 // 2,
    )


def _qkv(backend: Qkv, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    parts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    fused = torch.randn(num_rows, sum(parts), shape.head_dim, device=device).to(dtype)
    rows = torch.randperm(num_rows, device=device)
    rotation = Rotation(table=rope_table(shape.head_dim, 1e4, None, num_rows).to(device), positions=rows)
    weight = torch.ones(shape.head_dim, dtype=dtype, device=device)
    norms = HeadNorms(query=weight, key=weight, eps=1e-6)
    num_pages = -(-num_rows // PAGE_SIZE)
    size = (num_pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
    pages = torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)

    q, k, v = fused.clone().split(parts, 1)

    def stored(backend: Qkv) -> Tensor:
        """Queries, and what the cache holds of the rows' keys and values."""
        q, k, v = fused.clone().split(parts, 1)
        backend.store(q, k, v, norms, rotation, *pages, rows)
        return torch.cat((q, *(page.flatten(0, 1)[rows] for page in pages)), 1)

    yield Case(
        shape=f"norm, rotate {num_rows}x{sum(parts)}x{shape.head_dim}",
        run=lambda: backend.store(q, k, v, norms, rotation, *pages, rows),
        actual=lambda: stored(backend),
        expected=lambda: stored(ReferenceQkv()),
        num_bytes=2 * count_bytes(fused),
    )


def _sample(
    backend: Sample, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    logits = torch.randn(num_rows, shape.vocab_size, device=device).to(dtype)
    temperatures = torch.full((num_rows,), 0.8, device=device)
    seeds = torch.arange(num_rows, device=device)
    arguments = (logits, seeds, seeds + 7, temperatures, seeds, torch.zeros_like(seeds))
    yield Case(
        shape=f"temperature {num_rows}x{shape.vocab_size}",
        run=lambda: backend.sample(*arguments),
        expected=lambda: ReferenceSample().sample(*arguments),
        num_bytes=count_bytes(logits),
    )
    for top_k, top_p in ((50, 0.9), (0, 0.95)):
        limits = Limits(
            top_ks=torch.full_like(seeds, top_k),
            top_ps=torch.full_like(temperatures, top_p),
            min_ps=torch.zeros_like(temperatures),
        )
        yield Case(
            shape=f"top-k {top_k}, top-p {top_p} {num_rows}x{shape.vocab_size}",
            run=partial(backend.sample, *arguments, limits),
            expected=partial(ReferenceSample().sample, *arguments, limits),
            num_bytes=count_bytes(logits),
            captures=not isinstance(backend, ReferenceSample),  # it looks at its values
        )
    yield Case(
        shape=f"20 logprobs {num_rows}x{shape.vocab_size}",
        run=lambda: backend.logprobs(logits, seeds.unsqueeze(1), 20)[2],
        expected=lambda: ReferenceSample().logprobs(logits, seeds.unsqueeze(1), 20)[2],
        num_bytes=count_bytes(logits),
    )


def _rows(shape: ModelShape, lens: list[int], query_lens: list[int], device: torch.device, num_shared: int) -> Rows:
    """Rows with pages of their own, but for the first `num_shared` tokens, which all have from the first row."""
    max_pages = -(-max(lens) // PAGE_SIZE)
    tables = torch.arange(1, len(lens) * max_pages + 1, dtype=torch.int32).view(len(lens), max_pages)
    tables[:, : num_shared // PAGE_SIZE] = tables[0, : num_shared // PAGE_SIZE]
    shared = (SharedPrefix(rows=tuple(range(len(lens))), num_tokens=num_shared),) if num_shared else None
    return Rows(
        page_tables=torch.cat((tables, torch.zeros_like(tables[:1]))).to(device),
        slots=torch.arange(len(lens), device=device),
        lens=torch.tensor(lens, dtype=torch.int32, device=device),
        len_bounds=lens,
        query_lens=query_lens,
        shared=shared,
    )


def _attention(
    backend: AttentionBackend,
    shape: ModelShape,
    rows: Rows,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    num_read: int,
) -> Case:
    settings = AttentionShape(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=PAGE_SIZE,
        max_pages=rows.page_tables.shape[1],
        scale=shape.head_dim**-0.5,
        dtype=dtype,
        device=device,
    )
    size = (rows.page_tables.numel() + 1, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
    k_pages, v_pages = (torch.randn(size, device=device).to(dtype) for _ in "kv")
    q = torch.randn(sum(rows.query_lens), shape.num_heads, shape.head_dim, device=device).to(dtype)
    attention = backend.create(settings, len(rows.query_lens))
    captures = backend.captures and max(rows.query_lens) == 1
    if captures:
        attend = attention.plan_decode(dataclasses.replace(rows, captured=True))
    else:
        attend = attention.plan_prefill(rows)
    assert not isinstance(attend, LatentAttend)
    plain = dataclasses.replace(rows, shared=None)
    pairs = sum(
        num * length - num * (num - 1) // 2 for num, length in zip(rows.query_lens, rows.len_bounds, strict=True)
    )
    return Case(
        shape=name,
        run=lambda: attend(q, k_pages, v_pages),
        expected=lambda: ReferenceAttention(settings).plan_prefill(plain)(q, k_pages, v_pages),
        num_bytes=2 * count_bytes(q) + 2 * num_read * shape.num_kv_heads * shape.head_dim * dtype.itemsize,
        num_flops=4 * pairs * shape.num_heads * shape.head_dim,
        captures=captures,
    )


def _decode_attention(
    backend: AttentionBackend, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    lens = [CONTEXT] * num_rows
    rows, name = _rows(shape, lens, [1] * num_rows, device, 0), f"{num_rows} rows of {CONTEXT}"
    yield _attention(backend, shape, rows, device, dtype, name, sum(lens))
    if backend.least_shared is not None and num_rows > 1:
        num_shared = CONTEXT // 2 // PAGE_SIZE * PAGE_SIZE
        rows, num_read = _rows(shape, lens, [1] * num_rows, device, num_shared), sum(lens) - (num_rows - 1) * num_shared
        yield _attention(backend, shape, rows, device, dtype, f"{name}, {num_shared} shared", num_read)


def _prefill_attention(
    backend: AttentionBackend, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    num_prompts = max(1, num_rows // 16)
    lens = [PROMPT] * num_prompts
    rows, name = _rows(shape, lens, lens, device, 0), f"{num_prompts} prompts of {PROMPT}"
    yield _attention(backend, shape, rows, device, dtype, name, sum(lens))


def _has_heads(shape: ModelShape) -> bool:
    return shape.latent is None


CASES: Mapping[str, OpCases] = {
    "linear": OpCases(LINEAR, _linear),
    "fp8_linear": OpCases(FP8_LINEAR, _fp8_linear),
    "norm": OpCases(NORM, _norm),
    "activation": OpCases(ACTIVATION, _activation),
    "qkv": OpCases(QKV, _qkv, _has_heads),
    "decode_attention": OpCases(DECODE_ATTENTION, _decode_attention, _has_heads),
    "prefill_attention": OpCases(PREFILL_ATTENTION, _prefill_attention, _has_heads),
    **LATENT_CASES,
    **MIXTURE_CASES,
    "sample": OpCases(SAMPLE, _sample),
}
