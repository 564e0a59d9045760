"""Models of eight-bit floats in blocks, of several families: against transformers with the same rounding put in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_parity import PROMPT as LONG_PROMPT
from family_parity import save_checkpoint
from fp8_checkpoints import STATED, emulated, save_fp8
from harness import Sequence, as_tensor, make_engine
from safetensors.torch import load_file, save_file

from hornbeam.core.errors import ConfigError
from hornbeam.layers.linear import Linear
from hornbeam.layers.moe import StackedLinear

pytestmark = pytest.mark.cpu
PROMPT = LONG_PROMPT[:21]
DENSE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
LATENT: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
MIXTURE = DENSE | {
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "latent": ("deepseek_v3", LATENT, {}),
    "latent, powers of two": ("deepseek_v3", LATENT, {"scale_fmt": "ue8m0"}),
    "dense": ("qwen3", DENSE, {}),
    "dense, biases": ("qwen2", {k: v for k, v in DENSE.items() if k != "head_dim"} | {"hidden_size": 256}, {}),
    "dense, some plain": ("qwen3", DENSE, {"plain": ("0.self_attn.q", "0.self_attn.k", "0.self_attn.v", "1.mlp.down")}),
    "mixture": ("qwen3_moe", MIXTURE, {"plain": ("mlp.gate.",)}),
    "mixture, some experts plain": ("qwen3_moe", MIXTURE, {"plain": ("mlp.gate.", "layers.1.mlp.experts.")}),
}


@pytest.mark.parametrize("row", ROWS)
def test_logprobs_equal_the_emulation(tmp_path: Path, row: str) -> None:
    """In many steps to the last bits. Where those let a feature be rounded to the next number, what follows moves."""
    model_type, settings, stated = ROWS[row]
    folder = save_fp8(tmp_path, model_type, settings, **stated)
    expected, executor, differences = emulated(folder, PROMPT), make_engine(folder, page_size=16).executor, []
    for slot, chunk_size in enumerate((None, 16, 7)):
        sequence = Sequence(executor, slot=slot, first_page=3 + 8 * slot, num_pages=8)
        rows = [as_tensor(sequence.prefill(PROMPT, chunk_size))]
        rows += [as_tensor(sequence.decode()) for _ in expected[1:]]
        for ours, theirs in zip(rows, expected, strict=True):
            assert ours.argmax() == theirs.argmax()
            assert (ours - theirs).std() < 0.04 * theirs.std()
            differences.append(float((ours - theirs).abs().max()))
    assert sorted(differences)[len(differences) // 4] < 1e-4


def edited(folder: Path, change: dict[str, Any], dropped: tuple[str, ...] = ()) -> Path:
    """The checkpoint with other tensors under some names, and without some."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if name not in dropped}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "dropped", "told"),
    [
        ({}, ("model.layers.0.mlp.down_proj.weight_scale_inv",), "missing.*mlp.down_proj.weight_scale_inv"),
        ({}, ("model.layers.1.self_attn.kv_b_proj.weight_scale_inv",), "missing.*kv_b_proj.weight_scale_inv"),
        ({"lm_head.weight_scale_inv": torch.ones(3, 2)}, (), "not known.*lm_head.weight_scale_inv"),
        ({"model.norm.weight_scale_inv": torch.ones(1, 2)}, (), "not known.*model.norm.weight_scale_inv"),
        ({"model.layers.0.mlp.down_proj.weight_scale_inv": torch.ones(3, 3)}, (), "wrong shape.*down_proj"),
        ({"model.layers.0.mlp.down_proj.weight": torch.ones(160, 256)}, (), "down_proj.weight.*torch.float32"),
        ({"lm_head.weight": torch.ones(300, 160).to(torch.float8_e4m3fn)}, (), "lm_head.weight.*float8"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, change: Any, dropped: Any, told: str) -> None:
    folder = edited(save_fp8(tmp_path, "deepseek_v3", LATENT), change, dropped)
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        make_engine(folder)


def test_parts_that_would_share_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="parts of 192, 192 outputs"):
        make_engine(save_fp8(tmp_path, "qwen3", DENSE | {"intermediate_size": 192}))


@pytest.mark.parametrize("row", ["dense", "latent", "mixture"])
def test_plain_weights_are_rounded_as_they_are_loaded(tmp_path: Path, row: str) -> None:
    """That gives the model that rounding them beforehand gives."""
    model_type, settings, stated = ROWS[row]
    before = make_engine(save_fp8(tmp_path / "fp8", model_type, settings, **stated)).executor._runner.model
    plain = save_checkpoint(tmp_path / "plain", model_type, settings)
    after = make_engine(plain, quantization="fp8").executor._runner.model
    theirs = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        if not name.endswith("attention.up.weight"):
            assert parameter.dtype == theirs[name].dtype
            torch.testing.assert_close(parameter.float(), theirs[name].float(), rtol=1e-6, atol=0)


def test_random_weights_have_the_usual_spread(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path, "qwen3_moe", MIXTURE, plain=("mlp.gate.", "0.self_attn.o_proj"))
    model = make_engine(folder, load_format="dummy").executor._runner.model
    products = {name: module for name, module in model.named_modules() if isinstance(module, Linear | StackedLinear)}
    assert sum(product.scales is None for product in products.values()) == 1  # what is listed; gates are apart
    for name, product in products.items():
        weight = product.weight.float()
        if product.scales is not None:
            assert product.weight.dtype == torch.float8_e4m3fn
            weight *= product.scales.flatten()[0]
        spread = 0.002 if name.endswith((".output", ".down")) else 0.02
        assert 0.95 < weight.std() / spread < 1.05
        assert abs(weight.mean() / spread) < 0.05


def test_other_encodings_of_such_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="drop --quantization grouped_int8"):
        make_engine(save_fp8(tmp_path, "qwen3", DENSE), quantization="grouped_int8")


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8"},
        {"quant_method": "awq"},
        STATED | {"weight_block_size": [64, 64]},
        STATED | {"activation_scheme": "static"},
        STATED | {"modules_to_not_convert": "lm_head"},
    ],
)
def test_other_formats_are_refused(tmp_path: Path, quantization: dict[str, Any]) -> None:
    folder = save_fp8(tmp_path, "qwen3", DENSE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ConfigError, match=r"quantization_config|modules_to_not_convert"):
        make_engine(folder)
