"""Models that no family implements against transformers' own attention, on tiny random checkpoints in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Sequence, as_tensor, make_engine
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.cpu

NUM_NEW = 8
PROMPT = [int(x) for x in torch.randint(0, 300, (37,), generator=torch.Generator().manual_seed(1))]
OTHER = [int(x) for x in torch.randint(0, 300, (21,), generator=torch.Generator().manual_seed(2))]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"intermediate_size": 96, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 96},
    "gpt2, scaled by layer": {"n_inner": 96, "scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": {"n_inner": 96},
    "gpt_neox": {"intermediate_size": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": GROUPED,
    "stablelm": GROUPED,
    "cohere": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": None},
    "olmo": GROUPED,
    "glm": {**GROUPED, "head_dim": 16},
    "glm4": {**GROUPED, "head_dim": 16},
    "nemotron": {**GROUPED, "head_dim": 16},
    "exaone4": {**GROUPED, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "arcee": GROUPED,
    "gemma": {**GROUPED, "head_dim": 32},
    "biogpt": {"intermediate_size": 96},
    "minicpm3": {**GROUPED, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "v_head_dim": 16},
    "olmoe": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param.partition(",")[0], MODELS[request.param], tmp_path_factory.mktemp("hosted"))


def save(model_type: str, settings: dict[str, Any], folder: Path) -> Path:
    """A checkpoint of random weights whose norms and biases are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | settings)))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def reference(folder: Path, prompt: list[int]) -> list[torch.Tensor]:
    """Logprobs [V] after the prompt and after each greedy token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, rows = list(prompt), []
    for _ in range(NUM_NEW):
        rows.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        ids.append(int(rows[-1].argmax()))
    return rows


def assert_equal(rows: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for row, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, other, atol=1e-4, rtol=0)
        assert row.argmax() == other.argmax()


def test_logprobs_equal_the_reference(checkpoint: Path) -> None:
    """In one piece and in chunks, side by side."""
    executor = make_engine(checkpoint, model_impl="transformers").executor
    whole = Sequence(executor, slot=1, first_page=3, num_pages=8)
    pieces = Sequence(executor, slot=2, first_page=11, num_pages=8)
    rows = [as_tensor(whole.prefill(PROMPT))]
    others = [as_tensor(pieces.prefill(OTHER, 8))]
    for _ in range(NUM_NEW - 1):
        rows.append(as_tensor(whole.decode()))
        others.append(as_tensor(pieces.decode()))
    assert_equal(rows, reference(checkpoint, PROMPT))
    assert_equal(others, reference(checkpoint, OTHER))
