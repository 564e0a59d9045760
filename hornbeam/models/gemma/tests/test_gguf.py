"""GGUF files of the family, written by the gguf package under its own names, hold the same model."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from family_parity import assert_same
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.cpu

ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
KINDS = ["full_attention", "sliding_attention", "sliding_attention"] * 2
# GGUF's architecture -> transformers' model_type and settings
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 6, "rope_parameters": ROPES, "layer_types": KINDS}),
}


def make_model(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 112, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    config = AutoConfig.for_model(model_type, **sizes, **heads, sliding_window=12, initializer_range=0.1, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def write(path: Path, architecture: str, model: PreTrainedModel) -> None:
    """The model as a float32 file; converters add 1 to the weights of norms."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    else:
        writer.add_array("gemma3.attention.sliding_window_pattern", [kind == "sliding_attention" for kind in KINDS])
        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, tensor in model.named_parameters():
        stored = tensor.detach() + 1 if name.endswith("norm.weight") else tensor.detach()
        writer.add_tensor(names.get_name(name, (".weight",)), stored.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", FILES)
def test_a_file_holds_the_same_model(tmp_path: Path, architecture: str) -> None:
    model = make_model(*FILES[architecture])
    write(tmp_path / "model.gguf", architecture, model)
    assert_same(tmp_path / "model.gguf", model)
