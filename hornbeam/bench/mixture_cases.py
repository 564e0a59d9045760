"""What `bench kernels` runs of the ops of mixtures: routing, and the experts of tokens that are routed uniformly."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from hornbeam.bench.kernel_shapes import Case, ModelShape, OpCases, num_bytes
from hornbeam.core.family import MixtureShape
from hornbeam.ops.moe.contract import (
    EXPERTS,
    ROUTING,
    ExpertsBackend,
    ExpertsShape,
    ExpertWeights,
    GatedUnit,
    Routing,
    RoutingRule,
)
from hornbeam.ops.moe.reference import ReferenceExperts, ReferenceRouting
from hornbeam.weights.fp8 import draw_values, drawn_scale, scales_shape

_NUM_GROUPS = 8  # of experts, of which half are kept


def _routing(
    backend: Routing, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    mixture = _mixture(shape)
    logits = torch.randn(num_rows, mixture.num_experts, device=device)
    correction = torch.randn(mixture.num_experts, device=device) * 0.1
    rules: dict[str, tuple[RoutingRule, Tensor | None]] = {
        "softmax": (RoutingRule(top_k=mixture.top_k, renormalize=True), None)
    }
    if mixture.num_experts % _NUM_GROUPS == 0 and mixture.num_experts // 2 >= mixture.top_k:
        limited = RoutingRule(
            top_k=mixture.top_k,
            scores="sigmoid",
            renormalize=True,
            num_groups=_NUM_GROUPS,
            num_kept_groups=_NUM_GROUPS // 2,
            group_score="two_best" if mixture.num_experts > _NUM_GROUPS else "best",
        )
        rules["sigmoid, groups"] = limited, correction
    for name, (rule, added) in rules.items():
        yield Case(
            shape=f"{name} {num_rows}x{mixture.num_experts}, {mixture.top_k}",
            run=partial(backend.route, logits, rule, added),
            actual=partial(_weighed, backend, logits, rule, added),
            expected=partial(_weighed, ReferenceRouting(), logits, rule, added),
            num_bytes=num_bytes(logits) + num_rows * mixture.top_k * 8,
        )


def _weighed(backend: Routing, logits: Tensor, rule: RoutingRule, correction: Tensor | None) -> Tensor:
    """Each expert's weight, [T, E]."""
    weights, ids = backend.route(logits, rule, correction)
    return torch.zeros_like(logits).scatter(1, ids.long(), weights)


def _experts(
    backend: ExpertsBackend, shape: ModelShape, num_rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Case]:
    mixture = _mixture(shape)
    settings = ExpertsShape(
        num_experts=mixture.num_experts,
        top_k=mixture.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size=mixture.intermediate_size,
        unit=GatedUnit(),
        fp8=shape.fp8,
        dtype=dtype,
        device=device,
    )
    experts = _draw(settings)
    x = torch.randn(num_rows, shape.hidden_size, device=device).to(dtype)
    ids = torch.rand(num_rows, mixture.num_experts, device=device).topk(mixture.top_k).indices.int()
    weights = torch.full(ids.shape, 1 / mixture.top_k, device=device)
    num_hit = len(ids.unique())
    run = backend.create(settings)
    tensors = (experts.gate_up, experts.down, experts.gate_up_scales, experts.down_scales)
    stacked = num_bytes(*(tensor for tensor in tensors if tensor is not None))
    size = 3 * shape.hidden_size * mixture.intermediate_size
    yield Case(
        shape=f"{num_rows} tokens, {num_hit} of {mixture.num_experts}",
        run=lambda: run(x, weights, ids, experts),
        expected=lambda: ReferenceExperts(settings)(x, weights, ids, experts),
        num_bytes=stacked * num_hit // mixture.num_experts + 2 * num_bytes(x),
        num_flops=2 * ids.numel() * size,
        captures=backend.captures,
    )


def _draw(settings: ExpertsShape) -> ExpertWeights:
    """Random weights of all experts, whose products keep the size of their inputs."""
    inner, hidden = settings.intermediate_size, settings.hidden_size
    gate_up, down = _stacked(settings, 2 * inner, hidden), _stacked(settings, hidden, inner)
    if settings.fp8 is None:
        return ExpertWeights(gate_up=gate_up, down=down)
    scales = [
        torch.full(scales_shape(values.shape), drawn_scale(values.shape[-1] ** -0.5), device=settings.device)
        for values in (gate_up, down)
    ]
    return ExpertWeights(gate_up=gate_up, down=down, gate_up_scales=scales[0], down_scales=scales[1])


def _stacked(settings: ExpertsShape, num_out: int, num_in: int) -> Tensor:
    values = torch.empty(settings.num_experts, num_out, num_in, dtype=settings.weight_dtype, device=settings.device)
    if settings.fp8 is None:
        return values.normal_(0, num_in**-0.5)
    draw_values(values, torch.Generator(settings.device))
    return values


def _mixture(shape: ModelShape) -> MixtureShape:
    assert shape.mixture is not None
    return shape.mixture


def _has_experts(shape: ModelShape) -> bool:
    return shape.mixture is not None


MIXTURE_CASES: Mapping[str, OpCases] = {
    "routing": OpCases(ROUTING, _routing, _has_experts),
    "experts": OpCases(EXPERTS, _experts, _has_experts),
}
