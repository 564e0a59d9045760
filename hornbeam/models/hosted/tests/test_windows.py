"""Models with windows, soft caps and sinks, through scheduler and engine: behind a window pages are given back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hornbeam
from hornbeam.models.hosted.tests.test_parity import GROUPED, OTHER, PROMPT, save

pytestmark = pytest.mark.cpu

ALTERNATING = {**GROUPED, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "olmo3": ALTERNATING,
    "cohere2": ALTERNATING,
    "exaone4": ALTERNATING,
    "gemma2": {**ALTERNATING, "head_dim": 32, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "starcoder2": {**GROUPED, "sliding_window": 16},
    "gpt_oss": {**ALTERNATING, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_and_logprobs_equal_the_reference(model_type: str, tmp_path: Path) -> None:
    folder = save(model_type, MODELS[model_type], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    params = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    flags = {"max_total_tokens": 512, "chunked_prefill_size": 16, "page_size": 4, "skip_tokenizer_init": True}
    with hornbeam.Engine(model_path=str(folder), model_impl="transformers", **flags) as engine:
        engine.generate(input_ids=PROMPT, sampling_params=params)
        prompts = [PROMPT, OTHER]
        answers = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
    assert answers[0]["meta_info"]["cached_tokens"] == 36
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_continues(model, prompt, answer["meta_info"]["output_token_logprobs"])


@torch.inference_mode()
def assert_continues(model: Any, prompt: list[int], logprobs: list[Any]) -> None:
    ids = [*prompt, *(token_id for _, token_id, _ in logprobs)]
    rows = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert [token_id for _, token_id, _ in logprobs] == rows.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor([value for value, _, _ in logprobs]), rows.amax(-1), atol=1e-4, rtol=0)
