"""Decode steps recorded as device graphs over fixed input buffers: one per padded batch size, lane and kind.

There are two kinds: rows that each read all of their own keys, and rows that read shared prefixes once.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hornbeam.core.plan import SharedPrefix, StepPlan
from hornbeam.executor.compiling import compiled
from hornbeam.executor.runner import NUM_LANES, Runner
from hornbeam.executor.state import Batch, SlotState
from hornbeam.layers.forward import Forward, GroupForward
from hornbeam.ops.attention.contract import Attend, LatentAttend
from hornbeam.ops.layout.contract import StepTokens
from hornbeam.platforms.contract import Capture


@dataclass(frozen=True, slots=True)
class Fit:
    """Which graph serves a step."""

    size: int  # rows or tokens, padding included
    shared: tuple[SharedPrefix, ...] | None  # prefixes that are read once; None: of the other kind


def fit_size(sizes: Sequence[int], number: int, *, pads: bool) -> int | None:
    """The least of the ascending `sizes` that holds `number`; None if there is none, or it may not be padded."""
    index = bisect_left(sizes, number)
    fits = index < len(sizes) and (pads or sizes[index] == number)
    return sizes[index] if fits else None


class DecodeGraphs:
    """Inputs are laid out in buffers that all sizes share; the outputs, logits, share memory as well.

    That is safe because steps run one after the other on one stream, and logits are consumed before the next step.
    """

    def __init__(
        self,
        runner: Runner,
        capture: Capture,
        state: SlotState,
        batch_sizes: tuple[int, ...],
        *,
        pads: bool,
        compile_up_to: int,
    ) -> None:
        """Capture ascending `batch_sizes`, those up to `compile_up_to` of the compiled model. pads: serve any size."""
        self._runner = runner
        self._state = state
        self._sizes = batch_sizes
        self._pads = pads
        self._compile_up_to = compile_up_to
        self._compiled = compiled(runner.model) if compile_up_to else runner.model
        tokens = state.padding(batch_sizes[-1], batch_sizes[-1])
        self._tokens = {size: tokens.first(size, size) for size in batch_sizes}
        self._shared_sizes = tuple(filter(_is_shared_size, batch_sizes)) if runner.shares else ()
        self._replays: dict[tuple[int, int, bool], Callable[[], Tensor]] = {}
        for size in reversed(batch_sizes):  # the largest first: the smaller ones then reuse its memory
            for lane in range(NUM_LANES):
                for shares in (False, True) if size in self._shared_sizes else (False,):
                    run = self._recordable(lane, size, shares)
                    known = lane > 0 and size > compile_up_to  # torch's compiler may look at what a lane has of its own
                    self._replays[lane, size, shares] = capture(run, known=known)

    def fit(self, plan: StepPlan) -> Fit | None:
        """The graph for a step of decode rows alone; None for other steps, and for larger ones than recorded."""
        if plan.chunks:
            return None
        shared = self._runner.worth_sharing(plan) if self._shared_sizes else None
        if shared is not None and (size := fit_size(self._shared_sizes, len(plan.decode), pads=self._pads)):
            return Fit(size, shared)
        size = fit_size(self._sizes, len(plan.decode), pads=self._pads)
        return None if size is None else Fit(size, None)

    def replay(self, lane: int, plan: StepPlan, batch: Batch, fit: Fit) -> tuple[StepTokens, Tensor]:
        """The step's tokens and their logits [size, V], padding included; valid until the next replay."""
        tokens = self._tokens[fit.size]
        self._state.lay_out(batch, tokens)
        self._plan(lane, fit.size, plan.decode_lens, fit.shared)
        return tokens, self._replays[lane, fit.size, fit.shared is not None]()

    def _plan(
        self, lane: int, size: int, len_bounds: tuple[int, ...], shared: tuple[SharedPrefix, ...] | None
    ) -> list[Attend | LatentAttend]:
        """Refresh what each group's attention reads: the same addresses for a lane, size and kind every time."""
        tokens, plan = self._tokens[size], self._runner.plan_decode
        slots_lens = tokens.decode_slots, tokens.decode_lens
        groups = range(len(tokens.cache_rows))
        return [plan(lane, group, *slots_lens, len_bounds, shared, captured=True) for group in groups]

    def _recordable(self, lane: int, size: int, shares: bool) -> Callable[[], Tensor]:
        """The forward pass over the buffers, planned for padding rows."""
        attends = self._plan(lane, size, (), () if shares else None)
        tokens = self._tokens[size]
        model = self._compiled if size <= self._compile_up_to else self._runner.model

        def run() -> Tensor:
            groups = [
                GroupForward(rows=rows, decode=attend, prefill=None)
                for rows, attend in zip(tokens.cache_rows, attends, strict=True)
            ]
            padding = tokens.slots == self._state.num_slots if size > 1 else None
            fwd = Forward(num_decode=size, caches=self._runner.caches, groups=tuple(groups), padding=padding)
            hidden = model(tokens.ids, tokens.positions, fwd)
            return self._runner.model.logits(hidden)

        return run


def _is_shared_size(size: int) -> bool:
    """Of the sizes of graphs, those that are recorded for shared prefixes, too: fewer, since padding is cheap there."""
    return size >= 4 and (size & (size - 1) == 0 or size % 32 == 0)
