"""The family against transformers, on tiny random checkpoints in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_parity import PROMPT, assert_parity, reference
from harness import Sequence, as_tensor, make_engine
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from hornbeam.models.gemma.spec import FAMILY

pytestmark = pytest.mark.cpu

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "query_pre_attn_scalar": 20,
    "sliding_window": 20,
}
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 30000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
ROWS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    "gemma2, no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2, window over everything": {"sliding_window": 256, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text, window over everything, biases": {"sliding_window": 256, "attention_bias": True},
    "gemma3_text, a cap that does not count": {"sliding_window_pattern": 3, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3_text, own layers": {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
    "gemma3_text, ropes, own head": {
        "rope_parameters": ROPES,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 3.0,
    },
}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=ROWS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param.partition(",")[0], **SIZES | ROWS[request.param])
    folder = tmp_path_factory.mktemp("tiny")
    randomised(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder


def test_logprobs_equal_the_reference(checkpoint: Path) -> None:
    assert_parity(checkpoint, reference(checkpoint))


def test_every_weight_is_named_and_matters(checkpoint: Path) -> None:
    """The second half guards the test above: a model whose weights hardly count would pass without some of them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    config = json.loads((checkpoint / "config.json").read_text())
    assert FAMILY.weight_map(FAMILY.parse(config)).keys() == {name for name, _ in model.named_parameters()}
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected = model(ids).logits[0, -1].log_softmax(-1)
        for name, parameter in model.named_parameters():
            saved = parameter.clone()
            parameter.mul_(1.1).add_(0.05)
            moved = (model(ids).logits[0, -1].log_softmax(-1) - expected).abs().max()
            parameter.copy_(saved)
            assert moved > 1e-3, name


@pytest.mark.parametrize("newer", [False, True], ids=["language_model.model", "model.language_model"])
@torch.inference_mode()
def test_the_text_part_of_a_larger_model(tmp_path: Path, newer: bool) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    config = Gemma3Config(
        text_config=SIZES | {"sliding_window_pattern": 2}, vision_config=vision, mm_tokens_per_image=4
    )
    model = randomised(Gemma3ForConditionalGeneration(config)).eval()
    model.save_pretrained(tmp_path, save_original_format=not newer)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        names = list(stored.keys())
    assert any(name.startswith("model.language_model.") for name in names) == newer
    row = as_tensor(Sequence(make_engine(tmp_path).executor, 0, 1, 8, num_groups=2).prefill(PROMPT))
    expected = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
