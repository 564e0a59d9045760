"""GGUF files of the family, written by the gguf package under its own names, hold the same model."""

from pathlib import Path

import gguf
import pytest
import torch
from family_parity import assert_same, save_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.cpu

ARCHITECTURES = {"command-r": gguf.MODEL_ARCH.COMMAND_R, "cohere2": gguf.MODEL_ARCH.COHERE2}


def write(path: Path, architecture: str, model: PreTrainedModel) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "cohere2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "model_type", "settings"),
    [("command-r", "cohere", {}), ("cohere2", "cohere2", {"sliding_window": 20, "num_hidden_layers": 4})],
)
def test_same_logprobs(tmp_path: Path, architecture: str, model_type: str, settings: dict[str, int]) -> None:
    folder = save_checkpoint(tmp_path, model_type, settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    write(tmp_path / "model.gguf", architecture, model)
    assert_same(tmp_path / "model.gguf", model)
