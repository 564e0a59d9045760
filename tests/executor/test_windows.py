"""Windowed layers in the whole engine: tokens never depend on how a batch is run, and only windows are kept."""

import random
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from executor.test_equivalence import VOCAB_SIZE, make_requests, run
from harness import make_engine
from transformers import Gemma2Config, Gemma2ForCausalLM

from hornbeam.core.request import Request, SamplingParams

pytestmark = pytest.mark.cpu

WINDOW = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        max_position_embeddings=320,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("windowed")
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, list[int]]:
    """Each request by itself: no cache, no chunks, no overlap."""
    engine = make_engine(checkpoint, disable_radix_cache=True)
    return {key: ids for request in make_requests() for key, ids in run(engine, [request], depth=1).items()}


@pytest.mark.parametrize(
    ("depth", "flags"),
    [
        (1, {}),
        (2, {"swa_full_tokens_ratio": 0.2}),
        (2, {"disable_radix_cache": True}),
        (2, {"page_size": 1, "chunked_prefill_size": 32}),
        (1, {"page_size": 64, "max_total_tokens": 2048, "chunked_prefill_size": 64}),
        (2, {"max_running_requests": 1}),
        (2, {"max_total_tokens": 160, "page_size": 4, "chunked_prefill_size": 16, "swa_full_tokens_ratio": 0.01}),
        (1, {"max_total_tokens": 112, "page_size": 1, "chunked_prefill_size": 16}),
    ],
    ids=str,
)
def test_greedy_tokens_are_the_same(
    checkpoint: Path, alone: dict[str, list[int]], flags: dict[str, Any], depth: int
) -> None:
    engine = make_engine(checkpoint, **flags)
    assert run(engine, make_requests(), depth) == alone
    assert run(engine, make_requests(), depth) == alone, "the second time, with a warm prefix cache"


def test_tokens_survive_retraction(checkpoint: Path, alone: dict[str, list[int]]) -> None:
    results = harness.run(make_engine(checkpoint, page_size=4), make_requests(), retract_after={2, 5, 9})
    assert {rid: result.token_ids for rid, result in results.items()} == alone


def test_a_long_text_keeps_its_window_alone_and_can_be_continued(checkpoint: Path) -> None:
    """In a pool for 56 tokens of windowed layers a text of 230 is generated, then continued from where it ended."""
    flags = {"page_size": 4, "chunked_prefill_size": 16, "max_total_tokens": 300, "swa_full_tokens_ratio": 0.01}
    engine, roomy = make_engine(checkpoint, **flags), make_engine(checkpoint, disable_radix_cache=True)
    assert engine.num_pages == (76, 15)
    draw = random.Random(1)
    prompt = tuple(draw.randrange(VOCAB_SIZE) for _ in range(30))
    for num_new, num_cached in ((200, 0), (20, 228)):
        sampling = SamplingParams(temperature=0, max_new_tokens=num_new, ignore_eos=True)
        request = Request(rid=str(num_new), prompt_ids=prompt, sampling=sampling)
        result = harness.run(engine, [request])[request.rid]
        assert result.token_ids == harness.run(roomy, [request])[request.rid].token_ids
        assert result.last is not None
        assert result.last.num_cached == num_cached
        prompt += (*result.token_ids, 5)
