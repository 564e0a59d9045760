"""Which steps are replayed, and that they say the same, on a device whose graphs run what is recorded once more."""

import dataclasses
import functools
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
import torch
from family_parity import save_checkpoint
from harness import make_engine

from hornbeam.core.request import Request, SamplingParams
from hornbeam.executor import build
from hornbeam.executor.graphs import DecodeGraphs, fit_size
from hornbeam.executor.mixed_graphs import MixedGraphs
from hornbeam.executor.runner import Runner
from hornbeam.executor.state import SlotState
from hornbeam.ops.attention.contract import DECODE_ATTENTION, PREFILL_ATTENTION
from hornbeam.ops.attention.reference import ReferenceAttention
from hornbeam.ops.moe.reference import ReferenceBackend, ReferenceRouting
from hornbeam.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.cpu


class Recordable:
    """The reference as an attention that graphs may hold: it reads the latest plan when it is run."""

    captures = captures_prefill = True
    least_shared = 64

    def __init__(self, shape=None):
        self._reference = ReferenceAttention(shape)
        self._plans, self._attends = {}, {}

    def supports(self, query):
        return None

    def create(self, shape, max_rows):
        return Recordable(shape)

    def plan_decode(self, rows):
        return self._plan(("decode", len(rows.slots), rows.slots.data_ptr()), rows)

    def plan_prefill(self, rows):
        return self._plan(("prefill", sum(rows.query_lens)), rows)

    def _plan(self, key, rows):
        if not rows.captured:
            return self._reference.plan_prefill(rows)
        before = self._plans.setdefault(key, rows)
        for name in ("page_tables", "slots", "lens"):
            assert getattr(before, name).data_ptr() == getattr(rows, name).data_ptr()
        assert len(before.query_lens) == len(rows.query_lens)
        assert sum(before.query_lens) == sum(rows.query_lens)
        self._plans[key] = rows
        return self._attends.setdefault(key, lambda q, *pages: self._attend(self._plans[key], q, *pages))

    def _attend(self, rows, q, k_pages, v_pages, sinks, fresh=None, out=None):
        numbers = zip(rows.len_bounds, rows.lens.tolist(), rows.query_lens, strict=True)
        used = [row for row, (bound, length, num_queries) in enumerate(numbers) if bound and length and num_queries]
        out = torch.zeros_like(q) if out is None else out
        if 0 in rows.len_bounds:  # only prefill has such rows
            out.zero_()
        if used:
            begins = torch.tensor([0, *rows.query_lens]).cumsum(0).tolist()
            places = torch.cat([torch.arange(begins[row], begins[row + 1]) for row in used])
            bounds, query_lens = ([values[row] for row in used] for values in (rows.len_bounds, rows.query_lens))
            real = dataclasses.replace(
                rows, slots=rows.slots[used], lens=rows.lens[used], len_bounds=bounds, query_lens=query_lens
            )
            assert real.lens.tolist() == bounds
            attend = self._reference.plan_prefill(dataclasses.replace(real, captured=False))
            out[places] = attend(q[places], k_pages, v_pages, sinks)
        return out


@pytest.fixture
def num_runs(monkeypatch) -> Counter[str]:
    """Makes the CPU a device with graphs; counts steps by how they were run."""
    counts: Counter[str] = Counter()

    def counted(cls, name, label):
        real = getattr(cls, name)

        def run(self, *arguments):
            counts[label] += 1
            return real(self, *arguments)

        monkeypatch.setattr(cls, name, run)

    facts = CpuPlatform.facts
    monkeypatch.setattr(CpuPlatform, "facts", lambda self: dataclasses.replace(facts(self), graphs=True))
    monkeypatch.setattr(CpuPlatform, "capture", lambda self, run, known=False: (run(), lambda: run())[1])
    for registry in (DECODE_ATTENTION, PREFILL_ATTENTION):
        monkeypatch.setattr(registry, "entries", {"recordable": f"{__name__}:BACKEND", **registry.entries})
    monkeypatch.setattr(
        build, "_launch_bound", lambda executor, num_slots, context_len, token_counts: token_counts[:11]
    )
    counted(DecodeGraphs, "replay", "decode")
    counted(MixedGraphs, "replay", "mixed")
    counted(Runner, "run", "launched")
    return counts


def generate(path: Path, **flags) -> dict[str, list[int]]:
    """Requests of several lengths, some with a beginning in common, that come to run beside each other."""
    draw = random.Random(0)
    shared = [draw.randrange(300) for _ in range(70)]
    lens = (3, 90, 20, 1, 33, 64, 7, 40, 150, 2)
    prompts = [(shared if i % 2 else []) + [draw.randrange(300) for _ in range(n)] for i, n in enumerate(lens)]
    requests = [
        Request(
            rid=str(i),
            prompt_ids=tuple(ids),
            sampling=SamplingParams(temperature=0, max_new_tokens=3 + 2 * i, ignore_eos=True),
        )
        for i, ids in enumerate(prompts)
    ]
    flags = {"chunked_prefill_size": 64, "max_running_requests": 4, **flags}
    return {rid: result.token_ids for rid, result in harness.run(make_engine(path, **flags), requests).items()}


@pytest.mark.parametrize("max_running_requests", [4, 1])
def test_replayed_steps_say_the_same(tiny_checkpoint, num_runs, max_running_requests):
    expected = generate(tiny_checkpoint, disable_cuda_graph=True, attention_backend="reference")
    assert num_runs.keys() == {"launched"}
    num_runs.clear()
    flags = {"max_running_requests": max_running_requests, "disable_cascade_attention": True}
    assert generate(tiny_checkpoint, attention_backend="recordable", **flags) == expected
    assert num_runs["mixed"] > 10
    assert num_runs["decode"] > 10
    assert num_runs["launched"] == 3, "these are of the warm-up"


def test_rows_that_sample_are_as_many_as_some_graph_has(tiny_checkpoint, num_runs, monkeypatch):
    apply, numbers = SlotState.apply, Counter()

    def counted(self, *arguments):
        batch = apply(self, *arguments)
        numbers[len(batch.sample_rows)] += 1
        return batch

    monkeypatch.setattr(SlotState, "apply", counted)
    generate(tiny_checkpoint, attention_backend="recordable", cuda_graph_bs=[2, 3])
    assert numbers.keys() == {2, 3, 4}, "there are four slots, and no graph for four"


@pytest.mark.parametrize(
    ("flags", "replayed"),
    [
        ({}, {"decode", "mixed"}),
        ({"disable_decode_cuda_graph": True}, {"mixed"}),
        ({"disable_prefill_cuda_graph": True}, {"decode"}),
        ({"disable_cuda_graph_padding": True, "cuda_graph_bs": [4]}, {"decode"}),
        ({"cuda_graph_max_bs": 1}, {"decode", "mixed"}),
    ],
    ids=str,
)
def test_flags(tiny_checkpoint, num_runs, flags, replayed):
    expected = generate(tiny_checkpoint, disable_cuda_graph=True, attention_backend="reference")
    num_runs.clear()
    assert generate(tiny_checkpoint, attention_backend="recordable", **flags) == expected
    assert {kind for kind in ("decode", "mixed") if num_runs[kind]} == replayed
    assert num_runs["launched"] > 2 or not flags


def test_steps_are_recorded_whose_launch_takes_longer_than_they_do(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(build, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Step:
        def __init__(self, seconds):
            self._end = clock[0] + seconds
            clock[0] += 10

        def result(self):
            clock[0] = max(clock[0], self._end)

    def launch(plan):
        assert all(chunk.slot == 4 and len(chunk.token_ids) <= 300 for chunk in plan.chunks)
        return Step(plan.num_tokens / 50)

    executor = SimpleNamespace(launch=launch)
    assert build._launch_bound(executor, 4, 300, (32, 64, 512, 640, 1024)) == (32, 64, 512)
    assert build._launch_bound(executor, 4, 300, (1024,)) == ()
    assert build._launch_bound(executor, 4, 100, (32, 64, 512)) == (32, 64), "no step has 512 tokens"


def test_compiled_steps_say_the_same(tiny_checkpoint, num_runs, monkeypatch):
    expected = generate(tiny_checkpoint, disable_cuda_graph=True, attention_backend="reference")
    shapes: list[int] = []

    def backend(graph, inputs):
        shapes.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    flags = {"enable_torch_compile": True, "torch_compile_max_bs": 2, "attention_backend": "recordable"}
    assert generate(tiny_checkpoint, **flags) == expected
    assert max(shapes) > 5


def test_padding_takes_no_expert(tmp_path, num_runs, monkeypatch):
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    folder = save_checkpoint(tmp_path, "qwen3_moe", experts)
    monkeypatch.setattr(ReferenceBackend, "captures", True)
    real, rows = ReferenceRouting.route, []

    def route(self, *arguments):
        weights, ids = real(self, *arguments)
        rows.append(((ids >= 0).all(1).sum().item(), len(ids)))
        return weights, ids

    monkeypatch.setattr(ReferenceRouting, "route", route)
    expected = generate(folder, disable_cuda_graph=True, attention_backend="reference")
    assert all(routed == total for routed, total in rows)
    assert generate(folder, attention_backend="recordable", disable_cascade_attention=True) == expected
    assert {"mixed", "decode"} < num_runs.keys()
    assert any(0 < routed < total for routed, total in rows)


def test_a_rehearsal_that_fails_is_told_and_costs_nothing_but_time(tiny_checkpoint, num_runs, monkeypatch, caplog):
    def rehearse(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(build.WithheldLaunches, "rehearse", rehearse)
    expected = generate(tiny_checkpoint, disable_cuda_graph=True, attention_backend="reference")
    with caplog.at_level("WARNING", build.__name__):
        assert generate(tiny_checkpoint, attention_backend="recordable") == expected
    assert num_runs["decode"] > 10
    assert "cannot be rehearsed (operation not permitted" in caplog.text


@pytest.mark.parametrize("fp8", [False, True])
def test_sizes_that_are_rehearsed(fp8, monkeypatch):
    made = []
    monkeypatch.setattr(build, "DecodeGraphs", lambda runner, capture, state, sizes, **options: made.append(sizes))
    build._rehearse(None, CpuPlatform(), None, (1, 2, 4, 16, 24, 56, 64, 96, 112, 128), fp8=fp8)
    assert made == [(1, 2, 16, 24, 56, 64, 112, 128) if fp8 else (1, 2, 16, 64, 128)]


def test_sizes():
    assert fit_size((1, 2, 8), 3, pads=True) == 8
    assert fit_size((1, 2, 8), 8, pads=False) == 8
    assert fit_size((1, 2, 8), 3, pads=False) is None
    assert fit_size((1, 2, 8), 9, pads=True) is None


BACKEND = Recordable()
