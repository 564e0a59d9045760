"""Runs steps: a StepPlan becomes device work, and later a StepResult.

Knows the model, the device and the cache tensors; knows nothing of requests, queues or text. Work is only enqueued
here; nothing waits for the device. Two steps may be under way, so whatever planning writes on the host exists twice
and alternates: a lane each.
"""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from hornbeam.cache.pool import CachePool
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.core.request import TokenLogprobs
from hornbeam.executor.graphs import DecodeGraphs
from hornbeam.executor.mixed_graphs import MixedGraphs
from hornbeam.executor.runner import NUM_LANES, Runner
from hornbeam.executor.state import Batch, SlotState
from hornbeam.ops.layout.contract import StepTokens
from hornbeam.platforms.contract import Pending, Platform
from hornbeam.sampling.logprobs import RowLogprobs
from hornbeam.sampling.sampler import Sampled, Sampler


class Executor:
    """Owns the device state of slots; borrows the model and the cache through `runner`."""

    def __init__(self, *, runner: Runner, platform: Platform, state: SlotState, sampler: Sampler) -> None:
        self._runner = runner
        self._platform = platform
        self._state = state
        self._sampler = sampler
        self._decode_graphs: DecodeGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None

    def launch(self, plan: StepPlan) -> Pending[StepResult]:
        """Start a step. Steps run in the order of their launch; what goes wrong is raised by the result."""
        return self._platform.submit(lambda: self._step(plan))

    def examine(self, plan: StepPlan) -> Tensor:
        """Run a step that samples nothing; the logits [T, V] after every token of it, for those who compare models."""
        return self._platform.submit(lambda: self._examine(plan)).result()

    def use_pool(self, pool: CachePool) -> None:
        """Read and write the tensors of `pool` from now on; graphs over another one are dropped."""
        self.use_graphs(None, None)
        self._runner.use_pool(pool)

    def use_graphs(self, decode: DecodeGraphs | None, mixed: MixedGraphs | None) -> None:
        """Replay these, over the present pool, where they fit."""
        self._decode_graphs, self._mixed_graphs = decode, mixed

    @torch.inference_mode()
    def _examine(self, plan: StepPlan) -> Callable[[], Tensor]:
        lane = plan.step_id % NUM_LANES
        batch = self._state.apply(plan, lambda host: self._platform.upload(host, lane))
        hidden = self._runner.run(lane, plan, batch, self._state.tokens(batch), None)
        logits = self._runner.model.logits(hidden)
        return lambda: logits

    @torch.inference_mode()
    def _step(self, plan: StepPlan) -> Callable[[], StepResult]:
        _refuse_unsupported(plan)
        lane = plan.step_id % NUM_LANES
        graphs = self._decode_graphs
        fit = None if graphs is None else graphs.fit(plan)
        batch = self._state.apply(plan, lambda host: self._platform.upload(host, lane))
        if graphs is not None and fit is not None:
            tokens, logits = graphs.replay(lane, plan, batch, fit)
            scores = None
        else:
            tokens, sampling, hidden = self._hidden(lane, plan, batch)
            logits, scores = self._runner.model.logits(sampling), self._score(plan, batch, hidden)
        sampled = self._sample(plan, batch, tokens, logits) if plan.num_samples else None
        return lambda: _result(plan, sampled, scores)

    def _hidden(self, lane: int, plan: StepPlan, batch: Batch) -> tuple[StepTokens, Tensor, Tensor]:
        """The step's tokens; hidden rows of those that sample; and of all, padding included, if any score others."""
        graphs = self._mixed_graphs
        if graphs is not None and (fit := graphs.fit(plan)) is not None:
            tokens, hidden = graphs.replay(lane, plan, batch, fit)
            return tokens, hidden[batch.sample_rows], hidden
        tokens = self._state.tokens(batch)
        if plan.chunks and not len(batch.score_rows):
            hidden = self._runner.run(lane, plan, batch, tokens, batch.sample_rows)
            return tokens, hidden, hidden
        hidden = self._runner.run(lane, plan, batch, tokens, None)
        return tokens, hidden[batch.sample_rows], hidden

    def _sample(self, plan: StepPlan, batch: Batch, tokens: StepTokens, logits: Tensor) -> Sampled:
        """Choose ids, remember them on the device, and start their way to the host."""
        num_rows = plan.num_samples
        if plan.chunks:
            rows = batch.sample_rows[:num_rows]  # positions are of one dtype in all steps: kernels are compiled for it
            slots, positions = tokens.slots[rows], (tokens.positions[rows] + 1).int()
        else:
            slots, positions = tokens.decode_slots[:num_rows], tokens.decode_lens[:num_rows]
        wanted, last_ids = (plan.sampling_slots, batch.logprob_rows), self._state.last_ids
        return self._sampler.sample(logits[:num_rows], slots, positions, last_ids, *wanted).download()

    def _score(self, plan: StepPlan, batch: Batch, hidden: Tensor) -> RowLogprobs | None:
        """Logprobs of the prompts' tokens that are wanted, on their way to the host."""
        host_slots = [chunk.slot for chunk in plan.chunks for _ in chunk.scored_ids]
        if not host_slots:
            return None
        model = self._runner.model
        return self._sampler.score(
            lambda rows: model.logits(hidden[rows]), batch.score_rows, batch.score_ids, batch.score_slots, host_slots
        ).download()


def _result(plan: StepPlan, sampled: Sampled | None, scores: RowLogprobs | None) -> StepResult:
    """What was downloaded, as plain numbers. Rows of one chunk, and rows that want logprobs, stand in plan order."""
    ids: list[int] = [] if sampled is None else sampled.ids.tolist()
    logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    if sampled is not None and sampled.logprobs is not None:
        by_row = dict(zip(sampled.logprob_rows, sampled.logprobs.read(), strict=True))
        logprobs = tuple((by_row[row],) if row in by_row else () for row in range(plan.num_samples))
    entries = iter([] if scores is None else scores.read())
    return StepResult(
        step_id=plan.step_id,
        token_ids=tuple((i,) for i in ids),
        logprobs=logprobs,
        input_logprobs=tuple(tuple(islice(entries, len(c.scored_ids))) for c in plan.chunks if c.scored_ids),
    )


def _refuse_unsupported(plan: StepPlan) -> None:
    """Fields of a plan that have their place but no implementation yet must not be ignored."""
    unsupported = {
        "page_moves": plan.page_moves,
        "drafts": plan.drafts,
        "collect": plan.collect,
        "idle": plan.idle,
        "padded_tokens": plan.padded_tokens,
        "adapter_slot": any(start.adapter_slot for start in plan.starts),
        "embed_spans": any(chunk.embed_spans for chunk in plan.chunks),
    }
    if names := [name for name, value in unsupported.items() if value]:
        raise NotImplementedError(f"step {plan.step_id} asks for what no executor does yet: {', '.join(names)}")
