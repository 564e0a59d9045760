"""GGUF files of the family's rows, written by the gguf package under its own names, hold the same model."""

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from family_parity import assert_same
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.cpu

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0}
OLMO3 = {"num_hidden_layers": 4, "sliding_window": 20, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}
OLMO3["rope_scaling"] |= {"original_max_position_embeddings": 32}
# GGUF's architecture -> transformers' model_type and settings; names behind a comma are only for the test's name
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, factors": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, biases": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "granite": ("granite", GRANITE),
    "olmo2": ("olmo2", {}),
    "olmo2, windows": ("olmo3", OLMO3),
    "exaone4": ("exaone4", {"num_hidden_layers": 4, "sliding_window": 20, "head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 24}),
    "internlm2": ("llama", {}),
}
PAIRED = {"llama", "smollm3", "granite", "internlm2"}  # whose converters reorder queries and keys


def make_model(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **{**sizes, **heads, "initializer_range": 0.2, **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return model


def pair_rows(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows i and i + D/2 of each head side by side, as converters order them."""
    return tensor.view(num_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def write(path: Path, architecture: str, model: PreTrainedModel, tensors_per_part: int = 0) -> None:
    """The model as a float32 file, or as several parts."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    if "full_attention" in rope:
        rope = rope["full_attention"]
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if architecture == "phi3":
        writer.add_sliding_window(0)
    if architecture == "exaone4":
        writer.add_sliding_window(config.sliding_window)
    add_rope_factors(writer, config, rope, head_dim)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None and architecture in PAIRED:
            tensor = pair_rows(tensor, heads)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_rope_factors(writer: gguf.GGUFWriter, config: Any, rope: dict[str, Any], head_dim: int) -> None:
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelengths
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / (kept + (1 - kept) / rope["factor"])).numpy())
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        stretch = math.log(config.max_position_embeddings / original)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + stretch / math.log(original)))
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", torch.tensor(rope[f"{length}_factor"]).numpy())


@pytest.mark.parametrize("name", FILES)
def test_same_logprobs(name: str, tmp_path: Path) -> None:
    model = make_model(*FILES[name])
    write(tmp_path / "model.gguf", name.partition(",")[0], model)
    assert_same(tmp_path / "model.gguf", model)


def test_a_split_file(tmp_path: Path) -> None:
    """Given as its folder, or as any of its parts."""
    model = make_model("llama", {})
    write(tmp_path / "model.gguf", "llama", model, tensors_per_part=5)
    parts = sorted(tmp_path.iterdir())
    assert parts[0].name == "model-00001-of-00005.gguf"
    assert_same(tmp_path, model)
    assert_same(parts[2], model)
