"""Experts and routing: the reference against the definition, the kernels against the reference."""

import pytest
import torch
from torch import Tensor

from hornbeam.ops.moe.contract import ExpertsShape, ExpertWeights, GatedUnit, RoutingRule
from hornbeam.ops.moe.reference import EXPERTS, ROUTING

# Rows of padding hold whatever was in memory; in the interpreter, numpy warns of what comes of that.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|All-NaN):RuntimeWarning")

RULES = {
    "softmax": RoutingRule(top_k=4, renormalize=False),
    "softmax, one": RoutingRule(top_k=1, renormalize=True),
    "softmax, renormalized": RoutingRule(top_k=3, renormalize=True),
    "softmax, groups by best": RoutingRule(top_k=4, renormalize=False, factor=16.0, num_groups=6, num_kept_groups=2),
    "sigmoid, groups by two best": RoutingRule(
        top_k=4, scores="sigmoid", renormalize=True, factor=2.5, num_groups=4, num_kept_groups=2, group_score="two_best"
    ),
}
CLAMPED = GatedUnit(alpha=1.702, limit=0.7, offset=1.0)


def slowly_routed(logits: Tensor, rule: RoutingRule, correction: Tensor) -> list[dict[int, float]]:
    """Expert -> weight of each token, by the definition, with Python's lists."""
    tokens = []
    for row in logits.double():
        scores = (row.softmax(-1) if rule.scores == "softmax" else row.sigmoid()).tolist()
        choice = [score + float(extra) for score, extra in zip(scores, correction, strict=True)]
        size = len(scores) // rule.num_groups
        count = 2 if rule.group_score == "two_best" else 1
        groups = [sum(sorted(choice[i * size : (i + 1) * size])[-count:]) for i in range(rule.num_groups)]
        kept = sorted(range(rule.num_groups), key=lambda i: -groups[i])[: rule.num_kept_groups]
        allowed = [expert for expert in range(len(scores)) if expert // size in kept]
        chosen = sorted(allowed, key=lambda expert: -choice[expert])[: rule.top_k]
        total = sum(scores[expert] for expert in chosen) if rule.renormalize else 1.0
        tokens.append({expert: scores[expert] / total * rule.factor for expert in chosen})
    return tokens


@pytest.mark.cpu
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_reference_routes_as_defined(rule: RoutingRule) -> None:
    torch.manual_seed(0)
    logits, correction = torch.randn(50, 24), torch.randn(24) * 0.3 - 1  # what groups leave out must not win by 0
    weights, ids = ROUTING.route(logits, rule, correction)
    for row, chosen, expected in zip(weights, ids, slowly_routed(logits, rule, correction), strict=True):
        assert dict(zip(chosen.tolist(), row.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)
        assert chosen.tolist() == list(expected)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("extras", [False, True])
def test_the_kernel_routes_as_the_reference(device, dtype, rule, extras):
    pytest.importorskip("triton")
    from hornbeam.ops.moe.triton_routing import BACKEND

    logits = torch.randn(9, 30, device=device).to(dtype)[:, :24] + torch.arange(24, device=device).to(dtype) / 64
    correction = torch.randn(24, device=device) * 0.3 - 1 if extras else None
    expert_map = (torch.randperm(24, device=device) - 4).clamp(min=-1).int() if extras else None
    padding = torch.arange(9, device=device) > 6 if extras else None
    weights, ids = BACKEND.route(logits, rule, correction, expert_map, padding)
    expected_weights, expected_ids = ROUTING.route(logits, rule, correction, expert_map, padding)
    torch.testing.assert_close(weights, expected_weights)
    assert ids.equal(expected_ids)
    assert [len(part) for part in BACKEND.route(logits[:0], rule)] == [0, 0]
    parts = torch.stack((logits.float() / 2,) * 2)
    for backend in (BACKEND, ROUTING):
        torch.testing.assert_close(backend.route(parts, rule), BACKEND.route(logits.float(), rule))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), -float("inf"), float("inf")])
def test_the_kernel_chooses_real_experts_whatever_logits_are(device, rule, bad):
    pytest.importorskip("triton")
    from hornbeam.ops.moe.triton_routing import BACKEND

    logits = torch.randn(3, 24, device=device)
    logits[0] = bad
    logits[1, ::2] = bad
    _, ids = BACKEND.route(logits, rule)
    assert all(len(set(row)) == rule.top_k and min(row) >= 0 and max(row) < 24 for row in ids.tolist())


def make_experts(num_experts: int, hidden: int, inner: int, dtype: torch.dtype, device, bias: bool) -> ExpertWeights:
    def draw(*shape: int) -> Tensor:
        return (torch.randn(num_experts, *shape, device=device) / shape[-1] ** 0.5).to(dtype)

    biases = {"gate_up_bias": draw(2 * inner), "down_bias": draw(hidden)} if bias else {}
    return ExpertWeights(gate_up=draw(2 * inner, hidden), down=draw(hidden, inner), **biases)


def make_shape(experts: ExpertWeights, top_k: int, unit: GatedUnit) -> ExpertsShape:
    num_experts, hidden, inner = experts.down.shape
    return ExpertsShape(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=inner,
        unit=unit,
        dtype=experts.down.dtype,
        device=experts.down.device,
    )


CHOICES = {
    "no token": torch.empty(0, 3),
    "one token": torch.tensor([[5, 0, 2]]),
    "all on one expert": torch.tensor([[1, -1, -1]] * 40),
    "none at all": torch.full((5, 3), -1),
    "any": torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:3] for i in range(50)]),
    "some missing": torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:3] for i in range(37)])
    .sub(3)
    .clamp(min=-1),
}


@pytest.mark.cpu
@pytest.mark.parametrize("unit", [GatedUnit(), CLAMPED], ids=["silu", "clamped"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_reference_is_the_weighted_sum(unit: GatedUnit, choice: str) -> None:
    torch.manual_seed(0)
    experts = make_experts(6, 12, 7, torch.float32, "cpu", bias=True)
    ids = CHOICES[choice].int()
    x, weights = torch.randn(len(ids), 12), torch.rand(len(ids), 3)
    expected = torch.zeros(len(ids), 12)
    limit = float("inf") if unit.limit is None else unit.limit
    for token, slot in (ids >= 0).nonzero().tolist():
        expert = int(ids[token, slot])
        gate, up = (experts.gate_up[expert] @ x[token] + experts.gate_up_bias[expert]).chunk(2)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        inner = (up + unit.offset) * gate * torch.sigmoid(gate * unit.alpha)
        expected[token] += weights[token, slot] * (experts.down[expert] @ inner + experts.down_bias[expert])
    compute, base = EXPERTS.create(make_shape(experts, 3, unit)), torch.randn_like(x)
    torch.testing.assert_close(compute(x, weights, ids, experts), expected)
    torch.testing.assert_close(compute(x, weights, ids, experts, base), base + expected)


@pytest.mark.cpu
@pytest.mark.parametrize("mask", [[0, 1, 2, 3, 4, 5], [], [2], [0, 5], [1, 2, 3, 4]])
def test_experts_that_are_elsewhere_add_what_is_missing(mask: list[int]) -> None:
    """The sum over experts of a mask, and that over the others, through the map that the routing applies."""
    torch.manual_seed(0)
    experts, rule = make_experts(6, 12, 7, torch.float32, "cpu", bias=True), RULES["softmax, renormalized"]
    x, logits = torch.randn(9, 12), torch.randn(9, 6)
    compute = EXPERTS.create(make_shape(experts, rule.top_k, GatedUnit()))
    here = torch.tensor([expert if expert in mask else -1 for expert in range(6)], dtype=torch.int32)
    elsewhere = torch.where(here < 0, torch.arange(6, dtype=torch.int32), -1)
    maps = (None, here, elsewhere)
    everything, *parts = (compute(x, *ROUTING.route(logits, rule, expert_map=ids), experts) for ids in maps)
    torch.testing.assert_close(parts[0] + parts[1], everything)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("unit", "bias"), [(GatedUnit(), False), (CLAMPED, True)], ids=["silu", "clamped"])
def test_the_kernels_sum_as_the_reference(device, choice, unit, bias):
    pytest.importorskip("triton")
    from hornbeam.ops.moe.tiles import Tile, Tiles
    from hornbeam.ops.moe.triton import TritonExperts

    experts = make_experts(6, 72, 40, torch.float32, device, bias)
    ids = CHOICES[choice].int().to(device)
    x, weights = torch.randn(len(ids), 72, device=device), torch.rand(len(ids), 3, device=device)
    shape = make_shape(experts, 3, unit)
    base = torch.randn_like(x) if bias else None
    expected = EXPERTS.create(shape)(x, weights, ids, experts, base)
    small = Tile(block_n=32, block_k=32, group=2, num_warps=4, num_stages=2)
    out = TritonExperts(shape).run(x, weights, ids, experts, Tiles(block_m=16, gate_up=small, down=small), base)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("unit", "bias"), [(GatedUnit(), False), (CLAMPED, True)], ids=["silu", "clamped"])
def test_few_tokens_sum_as_the_reference(device, unit, bias):
    pytest.importorskip("triton")
    from hornbeam.ops.moe.triton_rows import run_few_tokens

    experts = make_experts(5, 24, 20, torch.float32, device, bias)
    ids = torch.tensor([[4, 0], [2, -1]], dtype=torch.int32, device=device)
    x, weights = torch.randn(2, 24, device=device), torch.rand(2, 2, device=device)
    base = torch.randn_like(x) if bias else None
    expected = EXPERTS.create(make_shape(experts, 2, unit))(x, weights, ids, experts, base)
    out = run_few_tokens(x, weights, ids, experts, unit, base)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_the_kernels_in_half_precision_with_the_default_tiles(device, dtype):
    pytest.importorskip("triton")
    from hornbeam.ops.moe.tiles import default_tiles
    from hornbeam.ops.moe.triton import TritonExperts

    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cannot multiply bfloat16 matrices")
    experts = make_experts(4, 64, 96, dtype, device, bias=False)
    ids = torch.tensor([[0, 2], [3, 2], [1, 0]], dtype=torch.int32, device=device)
    x, weights = torch.randn(3, 64, device=device).to(dtype), torch.rand(3, 2, device=device)
    shape = make_shape(experts, 2, GatedUnit())
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    expected = EXPERTS.create(shape)(x, weights, ids, experts)
    out = TritonExperts(shape).run(x, weights, ids, experts, default_tiles(1))
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 3), (7, 40), (900, 6), (6000, 5)])
def test_the_order_has_every_pair_once_under_its_expert(device, num_tokens, num_experts):
    pytest.importorskip("triton")
    from hornbeam.ops.moe.triton_order import order_by_expert

    ids = torch.randint(-1, num_experts, (num_tokens, 3), device=device, dtype=torch.int32)
    ids[ids == 2] = 1  # nobody takes expert 2
    order = order_by_expert(ids, num_experts, 16)
    used = int(order.num_rows)
    assert used <= len(order.pairs)
    pairs = order.pairs[:used]
    experts = order.experts[: used // 16].repeat_interleave(16)
    real = pairs < ids.numel()
    assert ids.flatten()[pairs[real].long()].equal(experts[real])
    assert sorted(pairs[real].tolist()) == (ids.flatten() >= 0).nonzero().flatten().tolist()
    assert (pairs[~real] == ids.numel()).all()
    assert (~real).sum() < 16 * num_experts
    assert ((experts.long() * ids.numel() + pairs)[real].diff() > 0).all()  # each expert's in ascending order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "num_in", "num_out"), [(1, 64, 256), (700, 208, 272), (3000, 768, 2048)])
def test_the_second_product_of_many_tokens_as_that_of_few(dtype, num_tokens, num_in, num_out):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper alone")
    from hornbeam.ops.moe.gluon_down import multiply_down
    from hornbeam.ops.moe.tiles import default_tiles
    from hornbeam.ops.moe.triton import StackedWeights, multiply_pairs
    from hornbeam.ops.moe.triton_order import order_by_expert

    torch.manual_seed(0)
    ids = torch.randint(-1, 7, (num_tokens, 3), device="cuda", dtype=torch.int32)
    ids[ids == 2] = 1
    order = order_by_expert(ids, 7, 128)
    x = torch.randn(len(order.pairs), num_in, device="cuda").to(dtype)
    weights = (torch.randn(7, num_out, num_in, device="cuda") * num_in**-0.5).to(dtype)
    outs = [torch.full((num_tokens * 3, num_out), 9.0, dtype=dtype, device="cuda") for _ in range(2)]
    multiply_down(x, weights, outs[0], order)
    multiply_pairs(x, StackedWeights(weights), outs[1], order, default_tiles(1000).down)
    torch.testing.assert_close(*outs, atol=1e-2, rtol=1e-2)  # untouched where there is no expert, too
