"""The family against transformers, on tiny random checkpoints in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_parity import PROMPT, assert_parity, reference, save_checkpoint

pytestmark = pytest.mark.cpu

KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
ROWS: dict[str, dict[str, Any]] = {
    "cohere": {},
    "cohere, head norms, biases": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5},
    "cohere, own head, one key": {"tie_word_embeddings": False, "num_key_value_heads": 1},
    "cohere2": {"sliding_window": 9, "num_hidden_layers": 4},
    "cohere2, own layers": {"sliding_window": 20, "layer_types": KINDS, "attention_bias": True},
    "cohere2, window over everything": {"sliding_window": 256, "layer_types": KINDS},
}


@pytest.fixture(scope="module", params=ROWS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), request.param.partition(",")[0], ROWS[request.param])


def test_logprobs_equal_the_reference(checkpoint: Path) -> None:
    assert_parity(checkpoint, reference(checkpoint))


@torch.inference_mode()
def test_every_weight_matters(checkpoint: Path) -> None:
    """Guards the test above: a model whose weights hardly count would pass it with any of them missing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    expected = model(ids).logits[0, -1].log_softmax(-1)
    for name, parameter in model.named_parameters():
        saved = parameter.clone()
        parameter.mul_(1.1).add_(0.02 * torch.randn_like(parameter))
        moved = (model(ids).logits[0, -1].log_softmax(-1) - expected).abs().max()
        parameter.copy_(saved)
        assert moved > 2e-4 or name.endswith("k_proj.bias"), name
