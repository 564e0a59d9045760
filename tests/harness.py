"""Runs a checkpoint's model step by step without scheduler or engine, to compare its logits with a reference."""

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hornbeam.config.flags import check_flags
from hornbeam.config.resolve import resolve_engine
from hornbeam.core.plan import Chunk, PageGrant, SlotStart, StepPlan
from hornbeam.core.request import LogprobOptions, Request, RequestOutput, SamplingParams, TokenLogprobs
from hornbeam.executor.build import build_executor
from hornbeam.executor.executor import Executor
from hornbeam.models.index import find_family
from hornbeam.platforms.contract import Pending
from hornbeam.platforms.index import PLATFORMS
from hornbeam.scheduler.scheduler import Scheduler
from hornbeam.weights.checkpoint import open_checkpoint

GREEDY = SamplingParams(temperature=0)
EVERYTHING = LogprobOptions(num_top=2**30)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What an engine's loop joins."""

    scheduler: Scheduler
    executor: Executor
    num_pages: tuple[int, ...]  # of each cache group, the padding page included

    @property
    def num_groups(self) -> int:
        return len(self.num_pages)


def make_engine(path: Path, device: str = "cpu", **flags: Any) -> BuiltEngine:
    """The scheduler and executor that `hornbeam serve --model-path path` would run, with a small cache."""
    user = check_flags({"max_total_tokens": 1024, "max_running_requests": 16, **flags})
    checkpoint = open_checkpoint(path, user.get("load_format", "auto"))
    family = find_family(checkpoint.hf_config, frozenset(), user.get("model_impl", "auto"))
    config = family.parse(checkpoint.hf_config)
    platform = PLATFORMS.load(device).create()
    options = resolve_engine(user, family.name, family.defaults(config, device), config, platform.facts())
    built = build_executor(family, config, checkpoint, options, platform)
    scheduler = Scheduler(
        options.scheduler,
        options.cache,
        specs=built.specs,
        num_pages=built.num_pages,
        context_len=options.model.context_len,
        eos_ids=frozenset(),
    )
    return BuiltEngine(scheduler=scheduler, executor=built.executor, num_pages=built.num_pages)


@dataclass(slots=True)
class Generated:
    """What one request has yielded."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    input_logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: RequestOutput | None = None


def run(
    engine: BuiltEngine, requests: list[Request], depth: int = 2, retract_after: Container[int] = ()
) -> dict[str, Generated]:
    """Submit all at once and step with up to `depth` steps under way; after some steps everybody is retracted."""
    scheduler, executor = engine.scheduler, engine.executor
    for request in requests:
        scheduler.submit(request)
    results = {request.rid: Generated() for request in requests}
    under_way: list[Pending[Any]] = []
    num_launched = 0
    while scheduler.has_work:
        plan = scheduler.plan()
        if plan is not None:
            under_way.append(executor.launch(plan))
            num_launched += 1
            if num_launched in retract_after:
                scheduler.pause("retract")
                scheduler.resume()
        if plan is None or len(under_way) == depth:
            scheduler.apply(under_way.pop(0).result())
        for output in scheduler.drain():
            result = results[output.rid]
            result.token_ids += output.token_ids
            result.logprobs += output.logprobs
            result.input_logprobs += output.input_logprobs
            result.last = output
    scheduler.check()
    return results


class Sequence:
    """One request in slot `slot`, whose pages in every group are handed out in order from `first_page`."""

    def __init__(self, executor: Executor, slot: int, first_page: int, num_pages: int, num_groups: int = 1) -> None:
        self._executor = executor
        self._groups = range(num_groups)
        self._slot = slot
        self._len = 0
        self._step_id = 0
        self._pages = tuple(range(first_page, first_page + num_pages))

    def prefill(self, ids: list[int], chunk_size: int | None = None) -> dict[int, float]:
        """Run the prompt in chunks; the logprobs of all ids after it."""
        size = chunk_size or len(ids)
        start, grants = self._beginning()
        logprobs: dict[int, float] = {}
        for begin in range(0, len(ids), size):
            piece = tuple(ids[begin : begin + size])
            last = begin + size >= len(ids)
            chunk = Chunk(slot=self._slot, start=begin, token_ids=piece, samples=last)
            first = begin == 0
            logprobs = self._run(starts=(start,) * first, grants=grants * first, chunks=(chunk,))
        self._len = len(ids)
        return logprobs

    def examine(self, ids: list[int]) -> torch.Tensor:
        """Run the prompt; logprobs [T, V] after each of its tokens."""
        start, grants = self._beginning()
        chunk = Chunk(slot=self._slot, start=0, token_ids=tuple(ids), samples=False)
        plan = StepPlan(step_id=0, starts=(start,), grants=grants, chunks=(chunk,))
        return self._executor.examine(plan).float().log_softmax(-1)

    def decode(self) -> dict[int, float]:
        """Feed the last id chosen on the device; the logprobs of all ids after it."""
        self._len += 1
        return self._run(decode=(self._slot,), decode_lens=(self._len,))

    def _beginning(self) -> tuple[SlotStart, tuple[PageGrant, ...]]:
        start = SlotStart(slot=self._slot, num_cached=0, sampling=GREEDY, seed=0, logprobs=EVERYTHING)
        grants = (PageGrant(slot=self._slot, group=i, first=0, page_ids=self._pages) for i in self._groups)
        return start, tuple(grants)

    def _run(self, **fields: Any) -> dict[int, float]:
        self._step_id += 1
        result = self._executor.launch(StepPlan(step_id=self._step_id, **fields)).result()
        return dict(result.logprobs[0][0].top) if result.logprobs else {}


def as_tensor(logprobs: dict[int, float]) -> torch.Tensor:
    """[V] float32, by token id."""
    return torch.tensor([logprobs[token] for token in range(len(logprobs))])
