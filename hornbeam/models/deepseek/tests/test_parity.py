"""DeepSeek-V2 and V3 against transformers, on tiny random checkpoints in float32; and that no slip goes unseen."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_parity import PROMPT, assert_every_expert_agrees, assert_parity, reference, save_checkpoint
from harness import Sequence, as_tensor, make_engine, run
from safetensors.torch import load_file, save_file
from torch import Tensor

import hornbeam.ops.mla.prefill as latent_prefill
from hornbeam.core.request import Request, SamplingParams
from hornbeam.layers.moe import MoE
from hornbeam.models.deepseek.model import DeepseekModel
from hornbeam.ops.mla.reference import ReferenceRows
from hornbeam.ops.moe.reference import ReferenceRouting
from hornbeam.ops.qkv.reference import ReferenceQkv

pytestmark = pytest.mark.cpu

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
BASE: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 2560,
    "rope_parameters": YARN,
}
V3 = BASE | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}
V2 = BASE | {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ROWS: dict[str, dict[str, Any]] = {
    "deepseek_v2": V2 | {"norm_topk_prob": True, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek_v2, lite": V2 | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "rope_parameters": PLAIN},
    "deepseek_v3": V3,
    "deepseek_v3, unequal magnitudes": V3 | {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}},
    "deepseek_v3, other switches": V3
    | {
        "attention_bias": True,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "tie_word_embeddings": True,
        "first_k_dense_replace": 0,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {key: value for key, value in YARN.items() if not key.startswith("mscale")},
    },
}


@pytest.mark.parametrize("row", ROWS)
def test_logprobs_equal_the_reference(tmp_path: Path, row: str) -> None:
    folder = save_checkpoint(tmp_path, row.partition(",")[0], ROWS[row])
    assert_parity(folder, reference(folder), page_size=16)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_shared_experts_of_no_width(tmp_path: Path) -> None:
    """They have tensors nevertheless."""
    folder = save_checkpoint(tmp_path, "deepseek_v2", V2 | {"n_shared_experts": 0, "n_group": 2, "topk_group": 1})
    assert_parity(folder, reference(folder), page_size=16)


@pytest.mark.parametrize("row", ["deepseek_v2", "deepseek_v3"])
def test_every_weight_matters(tmp_path: Path, row: str) -> None:
    folder = save_checkpoint(tmp_path, row, ROWS[row])
    tensors = load_file(folder / "model.safetensors")
    for name in filter(lambda name: name.endswith("correction_bias"), tensors):
        tensors[name] *= 0.2  # so that every expert is chosen for some token
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_every_expert_agrees(folder, page_size=16)


@pytest.mark.parametrize("absorbed", [True, False])
def test_prefill_equals_the_reference_in_either_form(
    tmp_path: Path, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expanded, the prefix is cut into chunks of six tokens."""

    def rows_to_absorb(sizes, itemsize, query_lens, prefix_lens, most) -> list[int]:
        return list(range(len(query_lens))) if absorbed else []

    monkeypatch.setattr(latent_prefill, "rows_to_absorb", rows_to_absorb)
    monkeypatch.setattr(latent_prefill, "_CHUNK_BYTES", 6 * 4 * 4 * (32 + 16 + 24))
    folder = save_checkpoint(tmp_path, "deepseek_v3", V3)
    assert_parity(folder, reference(folder), page_size=16)


def test_the_layer_that_drafts_is_left_unread(tmp_path: Path) -> None:
    """Checkpoints have it behind the last layer."""
    folder = save_checkpoint(tmp_path, "deepseek_v3", V3)
    expected = prefilled(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.3.enorm.weight": torch.ones(64)}, folder / "model.safetensors")
    assert prefilled(folder).equal(expected)


def test_gates_stay_in_float32(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "deepseek_v3", V3)
    model = make_engine(folder, page_size=16, dtype="bfloat16").executor._runner.model
    x = torch.randn(5, 64).bfloat16()
    weight = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    torch.testing.assert_close(model.layers[1].mlp.gate(x, None), x.float() @ weight.T)


@pytest.mark.parametrize("flags", [{"quantization": "grouped_int8"}, {"dtype": "bfloat16"}])
def test_rounded_arithmetic_stays_close(tmp_path: Path, flags: dict[str, Any]) -> None:
    folder = save_checkpoint(tmp_path, "deepseek_v2", ROWS["deepseek_v2, lite"])
    expected = prefilled(folder)
    assert (prefilled(folder, **flags) - expected).std() < 0.1 * expected.std()


def test_tokens_do_not_depend_on_how_requests_are_batched(tmp_path: Path) -> None:
    """Six prompts that share beginnings, one at a time; then together, in chunks, twice: then with cached prefixes."""
    folder = save_checkpoint(tmp_path, "deepseek_v3", V3)
    long = [int(x) for x in torch.randint(3, 300, (150,), generator=torch.Generator().manual_seed(2))]
    sampling = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    requests = [Request(rid=str(n), prompt_ids=(*long[:n], n), sampling=sampling) for n in (20, 66, 70, 100, 130, 145)]
    together = make_engine(folder, chunked_prefill_size=32)
    alone = make_engine(folder, disable_radix_cache=True)
    expected = {request.rid: run(alone, [request])[request.rid].token_ids for request in requests}
    for _ in range(2):
        results = run(together, requests)
        assert {rid: result.token_ids for rid, result in results.items()} == expected


def prefilled(folder: Path, slip: Callable[[DeepseekModel], None] = lambda model: None, **flags: Any) -> Tensor:
    """Logprobs after the prompt, by a model that `slip` has tampered with."""
    executor = make_engine(folder, page_size=16, **flags).executor
    slip(executor._runner.model)
    return as_tensor(Sequence(executor, slot=0, first_page=1, num_pages=4).prefill(PROMPT))


def each_mixture(change: Callable[[MoE], None]) -> Callable[[DeepseekModel], None]:
    def slip(model: DeepseekModel) -> None:
        mixtures = [module for module in model.modules() if isinstance(module, MoE)]
        assert mixtures
        for mixture in mixtures:
            change(mixture)

    return slip


def rule(**changes: Any) -> Callable[[DeepseekModel], None]:
    return each_mixture(lambda mixture: setattr(mixture, "_rule", dataclasses.replace(mixture._rule, **changes)))


def without_correction(model: DeepseekModel) -> None:
    each_mixture(lambda mixture: mixture.correction.data.zero_())(model)


def without_shared(model: DeepseekModel) -> None:
    each_mixture(lambda mixture: setattr(mixture, "shared", None))(model)


class BiasedWeights(ReferenceRouting):
    """Weights experts by their corrected scores."""

    def route(self, logits: Tensor, rule: Any, correction: Tensor | None = None, *rest: Any) -> tuple[Tensor, Tensor]:
        _, ids = super().route(logits, rule, correction, *rest)
        weights = (logits.sigmoid() + correction).gather(1, ids.long())
        return weights / weights.sum(-1, keepdim=True) * rule.factor, ids


def biased_weights(model: DeepseekModel) -> None:
    each_mixture(lambda mixture: setattr(mixture, "_routing", BiasedWeights()))(model)


class HalfSplitRows(ReferenceRows):
    """Turns features that are half the rotated part apart."""

    def store(self, q: Tensor, row: Tensor, norm: Any, rotation: Any, pages: Tensor, rows: Tensor) -> None:
        still = dataclasses.replace(rotation, table=rotation.table.clone())
        width = still.table.shape[1]
        still.table[:, : width // 2], still.table[:, width // 2 :] = 1, 0
        super().store(q, row, norm, still, pages, rows)
        spare = torch.zeros(1, len(row), 1, width)
        k, v = row[:, None, -width:], row[:, None, -width:].clone()
        indices = torch.arange(len(row))
        ReferenceQkv().store(q[..., -width:], k, v, None, rotation, spare, spare.clone(), indices)
        pages.flatten(0, 2)[rows] = row


def half_split(model: DeepseekModel) -> None:
    for layer in model.layers:
        layer.attention._rows = HalfSplitRows()


def unnormalised_latent(model: DeepseekModel) -> None:
    for layer in model.layers:
        layer.attention.latent_norm.weight.data.fill_(1)


def without_yarn(model: DeepseekModel) -> None:
    angles = torch.arange(len(model.rotary.table))[:, None] * 10000.0 ** -(torch.arange(8) / 8)
    model.rotary.table = torch.cat((angles.cos(), angles.sin()), -1)


SLIPS: dict[str, Callable[[DeepseekModel], None]] = {
    "no correction": without_correction,
    "no limit to groups": rule(num_groups=1),
    "groups by their best expert": rule(group_score="best"),
    "weights from corrected scores": biased_weights,
    "no renormalisation": rule(renormalize=False),
    "scores by softmax": rule(scores="softmax"),
    "scaled twice": rule(factor=2.5**2),
    "no shared expert": without_shared,
    "rotation of halves": half_split,
    "no yarn": without_yarn,
    "a latent without its weights": unnormalised_latent,
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = save_checkpoint(tmp_path_factory.mktemp("v3"), "deepseek_v3", V3)
    return folder, prefilled(folder)


V2_SLIPS: dict[str, Callable[[DeepseekModel], None]] = {
    "no limit to groups": rule(num_groups=1),
    "groups by their two best experts": rule(group_score="two_best"),
    "renormalisation": rule(renormalize=True),
    "scores by sigmoid": rule(scores="sigmoid"),
    "not scaled": rule(factor=1.0),
    "rotation of halves": half_split,
}


@pytest.mark.parametrize("slip", V2_SLIPS)
def test_no_slip_in_the_second_version_goes_unseen(tmp_path: Path, slip: str) -> None:
    folder = save_checkpoint(tmp_path, "deepseek_v2", ROWS["deepseek_v2"])
    assert (prefilled(folder, V2_SLIPS[slip]) - prefilled(folder)).abs().max() > 0.02


@pytest.mark.parametrize("slip", SLIPS)
def test_no_slip_goes_unseen(intact: tuple[Path, Tensor], slip: str) -> None:
    """Each changes the model by far more than the tolerance of the comparison with the reference."""
    folder, expected = intact
    assert (prefilled(folder, SLIPS[slip]) - expected).abs().max() > 0.05
