"""The dense family against transformers, on tiny random checkpoints in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_parity import PROMPT, assert_parity, reference
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.cpu

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0}
LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention"]
ROWS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied head": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, own head size": {"head_dim": 32},
    "llama, llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama, partial factor that does not count": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "llama, linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama, dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "llama, yarn rope": {"rope_parameters": YARN},
    "llama, yarn rope weighed": {
        "rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 16.0, "truncate": False}
    },
    "mistral": {"sliding_window": None},
    "mistral, wide window": {"sliding_window": 256},
    "mistral, window": {"sliding_window": 20},
    "qwen2": {},
    "qwen2, window": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},
    "smollm3": {"num_hidden_layers": 4},
    "smollm3, own layers": {"no_rope_layers": [0, 1, 0], "tie_word_embeddings": False},
    "smollm3, window": {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [0, 1, 0]},
    "phi3": {"partial_rotary_factor": 0.5},
    "phi3, window": {"sliding_window": 33},
    "phi3, longrope": {"rope_parameters": LONG, "original_max_position_embeddings": 32},
    "granite": GRANITE,
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 7, "rope_scaling": YARN, "rope_theta": 1e4},
    "exaone4": {"num_hidden_layers": 4, "sliding_window": 7},
    "exaone4, wide window": {"sliding_window": 300, "sliding_window_pattern": 2},
    "ministral": {"sliding_window": 9, "head_dim": 24, "layer_types": LAYER_TYPES},
    "seed_oss": {"head_dim": 24},
    "seed_oss, other biases": {"head_dim": 24, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module", params=ROWS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param.partition(",")[0],
        **{
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **ROWS[request.param],
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    return folder


def test_logprobs_equal_the_reference(checkpoint: Path) -> None:
    assert_parity(checkpoint, reference(checkpoint))


def test_every_weight_matters(checkpoint: Path) -> None:
    """Guards the test above: a model whose weights hardly count would pass it with any of them missing."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = model(ids).logits[0, -1].log_softmax(-1)
        for name, parameter in model.named_parameters():
            saved = parameter.clone()
            parameter.mul_(1.1).add_(0.02 * torch.randn_like(parameter))
            moved = (model(ids).logits[0, -1].log_softmax(-1) - expected).abs().max()
            parameter.copy_(saved)
            assert moved > 1e-3 or name.endswith("k_proj.bias"), name
