"""Scheduler and executor together: how a batch is run never changes what it says (greedy, float32)."""

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import BuiltEngine, make_engine
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hornbeam.core.errors import FamilyUnavailable
from hornbeam.core.request import Request, SamplingParams
from hornbeam.layers.linear import Linear

pytestmark = pytest.mark.cpu

VOCAB_SIZE = 300
NUM_NEW = 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_requests(temperature: float = 0.0) -> list[Request]:
    """Ten requests; most share a beginning, some share it exactly, lengths differ."""
    draw = random.Random(0)
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(70)]
    prompts = [
        shared[: draw.choice((5, 40, 64, 70))] + [draw.randrange(VOCAB_SIZE) for _ in range(n)] for n in range(9)
    ]
    sampling = SamplingParams(temperature=temperature, max_new_tokens=NUM_NEW, ignore_eos=True, seed=1)
    return [Request(rid=str(i), prompt_ids=tuple(ids), sampling=sampling) for i, ids in enumerate([*prompts, shared])]


def run(engine: BuiltEngine, requests: list[Request], depth: int = 2) -> dict[str, list[int]]:
    """Generated ids by request."""
    return {rid: result.token_ids for rid, result in harness.run(engine, requests, depth).items()}


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, list[int]]:
    """Each request by itself: no cache, no chunks, no overlap."""
    engine = make_engine(checkpoint, disable_radix_cache=True)
    return {key: ids for request in make_requests() for key, ids in run(engine, [request], depth=1).items()}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"disable_radix_cache": True},
        {"page_size": 1},
        {"page_size": 64, "max_total_tokens": 2048},
        {"chunked_prefill_size": 32},
        {"chunked_prefill_size": 1, "page_size": 1},
        {"max_running_requests": 3},
        {"disable_mixed_chunk": True, "chunked_prefill_size": 32, "max_total_tokens": 256},
        {"disable_fused_kernels": True},
        {"max_total_tokens": 256, "page_size": 4},
        *({"max_total_tokens": 256, "radix_eviction_policy": policy} for policy in ("lfu", "slru", "priority")),
        {"max_total_tokens": 112, "page_size": 1, "chunked_prefill_size": 16},
    ],
    ids=str,
)
def test_greedy_tokens_are_the_same(
    checkpoint: Path, alone: dict[str, list[int]], flags: dict[str, Any], depth: int
) -> None:
    engine = make_engine(checkpoint, **flags)
    assert run(engine, make_requests(), depth) == alone
    assert run(engine, make_requests(), depth) == alone, "the second time, with a warm prefix cache"


def steps(engine: BuiltEngine, number: int, found: dict[str, list[int]], under_way: list[Any]) -> None:
    """Go on with two steps under way, for `number` steps or to the end."""
    for _ in range(number):
        plan = engine.scheduler.plan()
        if plan is not None:
            under_way.append(engine.executor.launch(plan))
        if under_way and (plan is None or len(under_way) == 2):
            engine.scheduler.apply(under_way.pop(0).result())
        for output in engine.scheduler.drain():
            found.setdefault(output.rid, []).extend(output.token_ids)
        if not engine.scheduler.has_work:
            break


@pytest.mark.parametrize(
    "flags", [{}, {"page_size": 1, "chunked_prefill_size": 32}, {"max_total_tokens": 256}], ids=str
)
def test_pauses_and_aborts_around_a_request_do_not_change_it(
    checkpoint: Path, alone: dict[str, list[int]], flags: dict[str, Any]
) -> None:
    engine, found, under_way = make_engine(checkpoint, **{"page_size": 4, **flags}), {}, []
    for request in make_requests():
        engine.scheduler.submit(request)
        engine.scheduler.submit(dataclasses.replace(request, rid=f"aborted {request.rid}"))
    for index, mode in enumerate(["in_place", "retract", "in_place", "retract"]):
        steps(engine, 3, found, under_way)
        engine.scheduler.pause(mode)
        engine.scheduler.abort(f"aborted {index}")
        steps(engine, 3, found, under_way)
        engine.scheduler.flush()
        engine.scheduler.resume()
    for index in range(4, 10):
        steps(engine, 1, found, under_way)
        engine.scheduler.abort(f"aborted {index}")
    steps(engine, 10_000, found, under_way)
    assert {rid: ids for rid, ids in found.items() if rid in alone} == alone
    assert engine.scheduler.flush()
    engine.scheduler.check()


@pytest.mark.parametrize("flags", [{"page_size": 1}, {"page_size": 4, "schedule_policy": "dfs-weight"}], ids=str)
def test_a_random_prefix_tree_of_400_nodes_in_one_batch(checkpoint: Path, flags: dict[str, Any]) -> None:
    """Every node's prompt is that of its parent and a bit more. All at once yields what each yields alone."""
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(VOCAB_SIZE) for _ in range(4))]
    while len(prompts) < 400:
        parent = draw.choice(prompts[-150:])
        prompts.append(parent + tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 6))))
    sampling = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
    requests = [Request(rid=str(index), prompt_ids=ids, sampling=sampling) for index, ids in enumerate(prompts)]
    limits = {"max_total_tokens": 4096, "max_running_requests": 64}
    together = run(make_engine(checkpoint, **limits, **flags), requests)
    apart = make_engine(checkpoint, disable_radix_cache=True, **limits)
    sample = draw.sample(requests, 100)
    assert {request.rid: together[request.rid] for request in sample} == {
        rid: ids for request in sample for rid, ids in run(apart, [request], depth=1).items()
    }


def test_seeded_sampling_does_not_depend_on_the_batch(checkpoint: Path) -> None:
    requests = make_requests(temperature=0.8)
    together = run(make_engine(checkpoint), requests)
    engine = make_engine(checkpoint, disable_radix_cache=True)
    separately = {key: ids for request in requests for key, ids in run(engine, [request]).items()}
    assert together == separately
    assert len({tuple(ids) for ids in together.values()}) > 5


def test_a_family_whose_model_cannot_be_imported_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hornbeam.models.llama.model", None)
    with pytest.raises(
        FamilyUnavailable, match=r"'llama' is unavailable: import of hornbeam.models.llama.model halted"
    ):
        make_engine(checkpoint)


def test_the_last_layer_goes_on_with_the_rows_that_are_wanted(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(checkpoint, disable_radix_cache=True, chunked_prefill_size=32)
    seen: dict[Linear, list[int]] = {}
    added = Linear.added

    def counted(self: Linear, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        seen.setdefault(self, []).append(len(x))
        return added(self, x, *args, **options)

    monkeypatch.setattr(Linear, "added", counted)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=2, ignore_eos=True)
    run(engine, [Request(rid="a", prompt_ids=tuple(range(50)), sampling=sampling)])
    first, last = (layer.mlp.down for layer in engine.executor._runner.model.layers)
    assert seen[first] == [32, 18, 1]
    assert seen[last] == [1, 1, 1]
