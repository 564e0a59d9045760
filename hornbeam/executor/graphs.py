"""Decode steps recorded as device graphs over fixed input buffers: one per padded batch size, lane and kind.

There are two kinds: rows that each read all of their own keys, and rows that read shared prefixes once.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from hornbeam.core.plan import SharedPrefix, StepPlan
from hornbeam.executor.runner import NUM_LANES, Runner
from hornbeam.executor.state import Batch, SlotState
from hornbeam.layers.forward import GroupForward
from hornbeam.ops.attention.contract import Attend, LatentAttend
from hornbeam.platforms.contract import Platform

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """Inputs are copied into buffers that all sizes share; the outputs, logits, share one memory pool.

    That is safe because steps run one after the other on one stream, and logits are consumed before the next step.
    """

    def __init__(self, runner: Runner, platform: Platform, state: SlotState, batch_sizes: tuple[int, ...]) -> None:
        started = time.perf_counter()
        self._runner = runner
        self._state = state
        self._sizes = batch_sizes
        largest, device = batch_sizes[-1], platform.device
        self._slots = torch.full((largest,), state.num_slots, device=device)
        self._ids = torch.zeros_like(self._slots)
        self._positions = torch.zeros_like(self._slots)
        self._lens = torch.ones(largest, dtype=torch.int32, device=device)
        self._shared_sizes = tuple(filter(_is_shared_size, batch_sizes)) if runner.shares else ()
        self._replays: dict[tuple[int, int, bool], Callable[[], Tensor]] = {}
        for size in reversed(batch_sizes):  # the largest first: the smaller ones then reuse its memory
            for lane in range(NUM_LANES):
                for shares in (False, True) if size in self._shared_sizes else (False,):
                    self._replays[lane, size, shares] = platform.capture(self._recordable(lane, size, shares))
        seconds = time.perf_counter() - started
        logger.info("captured decode graphs for batch sizes %s in %.1f s", list(batch_sizes), seconds)

    def cover(self, plan: StepPlan) -> bool:
        """Whether the step is one of those recorded: decode rows alone, and not too many."""
        return not plan.chunks and len(plan.decode) <= self._sizes[-1]

    def padded(self, plan: StepPlan) -> int:
        """The batch size that a step runs with."""
        num_rows = len(plan.decode)
        sizes = self._sizes if self._shared(plan) is None else self._shared_sizes
        return sizes[bisect_left(sizes, num_rows)]

    def _shared(self, plan: StepPlan) -> tuple[SharedPrefix, ...] | None:
        """What the step reads once; None if that does not pay, or the step is larger than such ones are recorded."""
        recorded = self._shared_sizes and len(plan.decode) <= self._shared_sizes[-1]
        return self._runner.worth_sharing(plan) if recorded else None

    def replay(self, lane: int, plan: StepPlan, batch: Batch) -> Tensor:
        """Logits [B, V], valid until the next replay."""
        shared = self._shared(plan)
        size = len(batch.decode_slots)
        positions = self._state.lens[batch.decode_slots]
        self._slots[:size] = batch.decode_slots
        self._ids[:size] = self._state.last_ids[batch.decode_slots]
        self._positions[:size] = positions
        self._lens[:size] = positions + 1
        self._plan(lane, size, plan.decode_lens, shared)
        return self._replays[lane, size, shared is not None]()

    def _plan(
        self, lane: int, size: int, len_bounds: tuple[int, ...], shared: tuple[SharedPrefix, ...] | None
    ) -> list[Attend | LatentAttend]:
        """Refresh what each group's attention reads: the same addresses for a lane, size and kind every time."""
        slots, lens = self._slots[:size], self._lens[:size]
        groups = range(len(self._state.page_tables))
        plan = self._runner.plan_decode
        return [plan(lane, group, slots, lens, len_bounds, shared, captured=True) for group in groups]

    def _recordable(self, lane: int, size: int, shares: bool) -> Callable[[], Tensor]:
        """The forward pass over the buffers, planned for padding rows."""
        attends = self._plan(lane, size, (), () if shares else None)

        def run() -> Tensor:
            slots, positions = self._slots[:size], self._positions[:size]
            groups = [
                GroupForward(rows=self._state.cache_rows(group, slots, positions), decode=attend, prefill=None)
                for group, attend in enumerate(attends)
            ]
            padding = slots == self._state.num_slots if size > 1 else None
            fwd = self._runner.forward(size, groups, padding)
            hidden = self._runner.model(self._ids[:size], positions, fwd)
            return self._runner.model.logits(hidden)

        return run


def _is_shared_size(size: int) -> bool:
    """Of the sizes of graphs, those that are recorded for shared prefixes, too: fewer, since padding is cheap there."""
    return size >= 4 and (size & (size - 1) == 0 or size % 32 == 0)
