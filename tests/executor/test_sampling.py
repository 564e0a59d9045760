"""Sampling through scheduler and executor: logprobs against transformers, penalties against their definition, and
nothing of it changes with the batch, the cache, overlap or retraction (float32)."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Generated, make_engine, run
from transformers import LlamaConfig, LlamaForCausalLM

from hornbeam.core.request import LogprobOptions, Request, SamplingParams, TokenLogprobs
from hornbeam.platforms.cpu import CpuPlatform
from hornbeam.sampling import logprobs

pytestmark = pytest.mark.cpu

VOCAB_SIZE, NUM_NEW = 120, 30
FLAGS: list[dict[str, Any]] = [
    {},
    {"disable_radix_cache": True, "max_running_requests": 3},
    {"chunked_prefill_size": 16, "page_size": 1},
    {"max_total_tokens": 176, "page_size": 4, "schedule_conservativeness": 0.01},  # requests are retracted
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path_factory.mktemp("tiny"))
    return model


@pytest.fixture(scope="module")
def checkpoint(reference: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    reference.save_pretrained(folder)
    return folder


def make_requests() -> list[Request]:
    """Every way to sample, on prompts that share beginnings."""
    draw = random.Random(0)
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(80)]
    biases = tuple((draw.randrange(VOCAB_SIZE), draw.uniform(-3, 3)) for _ in range(9))
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "frequency_penalty": 1.5},
        {"temperature": 0.0, "presence_penalty": 2.0, "repetition_penalty": 1.6},
        {"temperature": 0.0, "repetition_penalty": 0.7, "frequency_penalty": -0.3, "logit_bias": biases},
        {"temperature": 0.0, "min_new_tokens": 6, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 2))},
        {"temperature": 1.2, "top_k": 7, "min_p": 0.05},
        {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "logit_bias": biases[:2]},
    ]
    prompts = [shared[: draw.choice((5, 20, 64, 80))] + [draw.randrange(VOCAB_SIZE) for _ in range(3)] for _ in ways]
    return [
        Request(
            rid=str(index),
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True, seed=index, **way),
            logprobs=LogprobOptions(num_top=index % 3, token_ids=(5, 7)[: index % 2], start=(None, 0, 10)[index % 3]),
        )
        for index, (prompt, way) in enumerate(zip(prompts, ways, strict=True))
    ]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, Generated]:
    """Each request by itself: no cache, no chunks, no overlap."""
    engine = make_engine(checkpoint, disable_radix_cache=True)
    return {rid: result for request in make_requests() for rid, result in run(engine, [request], depth=1).items()}


def flat(entries: list[TokenLogprobs]) -> list[float]:
    return [value for entry in entries for value in (entry.chosen, *(p for _, p in entry.top), *entry.asked)]


def spoil_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step uploads lasts no longer than the step, as on devices that read it in memory used again."""
    latest: list[torch.Tensor] = []

    def upload(self: CpuPlatform, host: torch.Tensor, lane: int) -> torch.Tensor:
        for tensor in latest:
            tensor.fill_(-1)
        latest[:] = [host]
        return host

    monkeypatch.setattr(CpuPlatform, "upload", upload)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_nothing_depends_on_how_it_is_run(
    checkpoint: Path, alone: dict[str, Generated], flags: dict[str, Any], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "BLOCK_ROWS", 16)
    spoil_uploads(monkeypatch)
    engine = make_engine(checkpoint, **flags)
    for retract_after in ((), (), (3, 4, 12, 25)):  # the second time with a warm prefix cache
        for rid, result in run(engine, make_requests(), depth, retract_after).items():
            assert result.token_ids == alone[rid].token_ids, rid
            for name in ("logprobs", "input_logprobs"):
                mine, others = flat(getattr(result, name)), flat(getattr(alone[rid], name))
                assert mine == pytest.approx(others, abs=2e-4), (rid, name)
        num_retracted = engine.scheduler.stats().total_retractions
        assert num_retracted or not (retract_after or "max_total_tokens" in flags)


def test_logprobs_equal_transformers(reference: LlamaForCausalLM, alone: dict[str, Generated]) -> None:
    for request in make_requests():
        result = alone[request.rid]
        ids = [*request.prompt_ids, *result.token_ids]
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        options = request.logprobs
        assert options is not None
        first = len(request.prompt_ids)
        check(result.logprobs, ids, expected, first, options)
        if options.start is None:
            assert result.input_logprobs == []
        else:
            assert len(result.input_logprobs) == len(request.prompt_ids) - options.start - 1
            check(result.input_logprobs, ids, expected, options.start + 1, options)


def check(
    entries: list[TokenLogprobs], ids: list[int], expected: torch.Tensor, first: int, options: LogprobOptions
) -> None:
    for position, entry in enumerate(entries, first):
        row = expected[position - 1]
        assert entry.chosen == pytest.approx(row[ids[position]].item(), abs=2e-4)
        assert [p for _, p in entry.top] == pytest.approx(row.topk(options.num_top).values.tolist(), abs=2e-4)
        assert entry.asked == pytest.approx([row[token].item() for token in options.token_ids], abs=2e-4)


@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_greedy_ids_follow_the_definition(reference: LlamaForCausalLM, alone: dict[str, Generated], index: int) -> None:
    """Penalties, biases and bans, token by token, on transformers' logits."""
    request = make_requests()[index]
    params, prompt, generated = request.sampling, list(request.prompt_ids), alone[request.rid].token_ids
    with torch.no_grad():
        all_logits = reference(torch.tensor([[*prompt, *generated]])).logits[0, len(prompt) - 1 : -1]
    for number, (logits, chosen) in enumerate(zip(all_logits, generated, strict=True)):
        before = generated[:number]
        for token in {*prompt, *before}:
            factor = params.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token in set(before):
            logits[token] -= params.frequency_penalty * before.count(token) + params.presence_penalty
        for token, bias in params.logit_bias:
            logits[token] += bias
        if number < params.min_new_tokens:
            logits[list(params.stop_token_ids)] = -torch.inf
        assert chosen == logits.argmax()
        assert (chosen in params.stop_token_ids) == (number == len(generated) - 1 and bool(params.stop_token_ids))


def test_decode_says_what_a_prefill_of_the_same_tokens_says(checkpoint: Path) -> None:
    """Kullback-Leibler divergence of whole distributions; the scored prompts come in chunks and out of the cache."""
    engine = make_engine(checkpoint, chunked_prefill_size=32, max_total_tokens=2048)
    prompts = [request.prompt_ids for request in make_requests()]
    everything = LogprobOptions(num_top=VOCAB_SIZE)
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True, seed=3)
    generating = [
        Request(rid=str(i), prompt_ids=p, sampling=sampling, logprobs=everything) for i, p in enumerate(prompts)
    ]
    generated = run(engine, generating)
    scoring = [
        Request(
            rid=rid,
            prompt_ids=(*prompts[int(rid)], *result.token_ids),
            sampling=SamplingParams(max_new_tokens=0),
            logprobs=LogprobOptions(num_top=VOCAB_SIZE, start=len(prompts[int(rid)]) - 1),
        )
        for rid, result in generated.items()
    ]
    scored = run(engine, scoring)
    for rid, result in generated.items():
        assert scored[rid].token_ids == []
        assert scored[rid].last is not None
        assert scored[rid].last.num_cached >= len(prompts[int(rid)]) - 16
        for one, other in zip(result.logprobs, scored[rid].input_logprobs, strict=True):
            p, q = (torch.tensor([dict(entry.top)[token] for token in range(VOCAB_SIZE)]) for entry in (one, other))
            assert one.chosen == pytest.approx(other.chosen, abs=1e-3)
            assert (p.exp() * (p - q)).sum().item() < 1e-3
