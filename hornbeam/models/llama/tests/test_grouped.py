"""Checkpoints whose queries, keys and values lie in one tensor, key-value head by head, hold the same model."""

import json
from pathlib import Path

import pytest
import torch
from harness import Sequence, as_tensor, make_engine
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.cpu

NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def regroup(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The same weights in the grouped layout, as its publishers describe it: 'q (h gs d)', queries first."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if "_proj" in name and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            continue
        for theirs, grouped in NAMES.items():
            name = name.replace(theirs, grouped)
        tensors[name] = tensor.clone()
    for index, layer in enumerate(model.model.layers):
        attention, kv_heads = layer.self_attn, config.num_key_value_heads
        parts = [getattr(attention, f"{x}_proj").weight.view(kv_heads, -1, 16, config.hidden_size) for x in "qkv"]
        tensors[f"model.layers.{index}.attention.wqkv.weight"] = torch.cat(parts, 1).reshape(-1, config.hidden_size)
    return tensors


@torch.inference_mode()
def test_same_logprobs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "separate")
    (tmp_path / "grouped").mkdir()
    save_file(regroup(model), tmp_path / "grouped" / "model.safetensors")
    config = json.loads((tmp_path / "separate" / "config.json").read_text()) | {
        "architectures": ["InternLM2ForCausalLM"],
        "rope_parameters": None,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bias": False,
    }
    (tmp_path / "grouped" / "config.json").write_text(json.dumps(config))
    separate, grouped = (
        as_tensor(Sequence(make_engine(tmp_path / name).executor, slot=0, first_page=1, num_pages=4).prefill([5, 9, 7]))
        for name in ("separate", "grouped")
    )
    torch.testing.assert_close(grouped, separate, atol=1e-6, rtol=0)
    torch.testing.assert_close(separate, model(torch.tensor([[5, 9, 7]])).logits[0, -1].log_softmax(-1))
