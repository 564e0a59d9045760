"""Decode steps recorded as device graphs, one per padded batch size and lane, over fixed input buffers."""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from hornbeam.core.plan import StepPlan
from hornbeam.executor.runner import NUM_LANES, Runner
from hornbeam.executor.state import Batch, SlotState
from hornbeam.layers.forward import GroupForward
from hornbeam.ops.attention.contract import Attend
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
        self._replays: dict[tuple[int, int], Callable[[], Tensor]] = {}
        for size in reversed(batch_sizes):  # the largest first: the smaller ones then reuse its memory
            for lane in range(NUM_LANES):
                self._replays[lane, size] = platform.capture(self._recordable(lane, size))
        seconds = time.perf_counter() - started
        logger.info("captured decode graphs for batch sizes %s in %.1f s", list(batch_sizes), seconds)

    def cover(self, plan: StepPlan) -> bool:
        """Whether the step is one of those recorded: decode rows alone, and not too many."""
        return not plan.chunks and len(plan.decode) <= self._sizes[-1]

    def padded(self, num_rows: int) -> int:
        """The batch size that a step of `num_rows` runs with."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, lane: int, plan: StepPlan, batch: Batch) -> Tensor:
        """Logits [B, V], valid until the next replay."""
        size = len(batch.decode_slots)
        positions = self._state.lens[batch.decode_slots]
        self._slots[:size] = batch.decode_slots
        self._ids[:size] = self._state.last_ids[batch.decode_slots]
        self._positions[:size] = positions
        self._lens[:size] = positions + 1
        self._plan(lane, size, plan.decode_lens)
        return self._replays[lane, size]()

    def _plan(self, lane: int, size: int, len_bounds: tuple[int, ...]) -> list[Attend]:
        """Refresh what each group's attention reads; the same objects for a lane and size every time."""
        slots, lens = self._slots[:size], self._lens[:size]
        groups = range(len(self._state.page_tables))
        return [self._runner.plan_decode(lane, group, slots, lens, len_bounds, captured=True) for group in groups]

    def _recordable(self, lane: int, size: int) -> Callable[[], Tensor]:
        """The forward pass over the buffers, planned for padding rows."""
        attends = self._plan(lane, size, ())

        def run() -> Tensor:
            slots, positions = self._slots[:size], self._positions[:size]
            groups = [
                GroupForward(rows=self._state.cache_rows(group, slots, positions), decode=attend, prefill=None)
                for group, attend in enumerate(attends)
            ]
            hidden = self._runner.model(self._ids[:size], positions, self._runner.forward(size, groups))
            return self._runner.model.logits(hidden)

        return run
