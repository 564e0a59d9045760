"""Steps with prompts recorded as device graphs: one per padded number of tokens, lane and kind.

A graph serves any numbers of decoding rows and chunks whose tokens it holds. Both attention calls are in it: decode
takes the first tokens as rows, of which those that do not decode are padding, and prefill takes all tokens, of which
those that are in no chunk have nothing to attend to: decode then writes over what prefill has written for its rows.
"""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hornbeam.core.plan import SharedPrefix, StepPlan
from hornbeam.executor.graphs import Fit, fit_size
from hornbeam.executor.runner import NUM_LANES, Runner
from hornbeam.executor.state import Batch, SlotState
from hornbeam.layers.forward import Forward, GroupForward
from hornbeam.ops.attention.contract import Attend, LatentAttend
from hornbeam.ops.layout.contract import StepTokens
from hornbeam.platforms.contract import Platform

logger = logging.getLogger(__name__)

MAX_CHUNKS = 30
_NUM_ROWS = MAX_CHUNKS + 2  # of prefill: the tokens that decode, the chunks, padding
_MOST_SHARED = 512  # tokens; larger steps with prompts that share prefixes are rare


class MixedGraphs:
    """Inputs are laid out in buffers that all sizes share, as with `DecodeGraphs`; outputs are hidden rows."""

    def __init__(
        self, runner: Runner, platform: Platform, state: SlotState, token_counts: tuple[int, ...], *, pads: bool
    ) -> None:
        """Record ascending `token_counts`. pads: serve any number."""
        started = time.perf_counter()
        self._runner = runner
        self._state = state
        self._sizes = token_counts
        self._pads = pads
        largest, device = token_counts[-1], platform.device
        tokens = state.padding(largest, self._num_decode(largest))
        self._tokens = {size: tokens.first(size, self._num_decode(size)) for size in token_counts}
        self._row_slots = torch.full((_NUM_ROWS,), state.num_slots, device=device)
        self._row_lens = torch.zeros(_NUM_ROWS, dtype=torch.int32, device=device)
        self._replays: dict[tuple[int, int, bool], Callable[[], Tensor]] = {}
        for size in reversed(token_counts):  # the largest first: the smaller ones then reuse its memory
            for lane in range(NUM_LANES):
                for shares in (False, True) if runner.shares and size <= _MOST_SHARED else (False,):
                    run = self._recordable(lane, size, shares=shares)
                    self._replays[lane, size, shares] = platform.capture(run, known=lane > 0)
        seconds = time.perf_counter() - started
        logger.info("captured graphs with prompts for token counts %s in %.1f s", list(token_counts), seconds)

    def fit(self, plan: StepPlan) -> Fit | None:
        """The graph for a step; None if it has too many tokens or chunks, or fewer tokens than rows of padding."""
        size = fit_size(self._sizes, plan.num_tokens, pads=self._pads)
        if size is None or not 0 < len(plan.chunks) <= MAX_CHUNKS:
            return None
        shared = self._runner.worth_sharing(plan)
        return None if shared is not None and size > _MOST_SHARED else Fit(size, shared)

    def replay(self, lane: int, plan: StepPlan, batch: Batch, fit: Fit) -> tuple[StepTokens, Tensor]:
        """The step's tokens, then padding, and their hidden rows [size, H]; valid until the next replay."""
        tokens = self._tokens[fit.size]
        self._state.lay_out(batch, tokens)
        tokens.decode_lens[len(plan.decode) :] = 0
        chunks = slice(1, 1 + len(plan.chunks))
        # By a kernel: CUDA would take what stands in the host's memory for the device's in a copy.
        torch.add(batch.chunk_slots, 0, out=self._row_slots[chunks])
        torch.add(batch.chunk_ends, 0, out=self._row_lens[chunks])
        self._plan(lane, fit.size, plan, fit.shared)
        return tokens, self._replays[lane, fit.size, fit.shared is not None]()

    def _num_decode(self, size: int) -> int:
        """Tokens that may decode: the first ones, as many as there can be requests; none beside the only one."""
        return min(size, self._state.num_slots) if self._state.num_slots > 1 else 0

    def _plan(
        self, lane: int, size: int, plan: StepPlan, shared: tuple[SharedPrefix, ...] | None
    ) -> list[tuple[Attend | LatentAttend | None, Attend | LatentAttend]]:
        """Refresh what each group's attention reads, decode and prefill."""
        tokens, unused = self._tokens[size], ((0, 0),) * (MAX_CHUNKS - len(plan.chunks))
        slots, lens = tokens.decode_slots, tokens.decode_lens
        chunks = ((chunk.end, len(chunk.token_ids)) for chunk in plan.chunks)
        rows = (0, len(plan.decode)), *chunks, *unused, (0, size - plan.num_tokens)
        runner, slots_lens, planned = self._runner, (self._row_slots, self._row_lens), []
        for group in range(len(self._state.page_tables)):
            decode = None
            if len(slots):
                decode = runner.plan_decode(lane, group, slots, lens, plan.decode_lens, shared, captured=True)
            planned.append((decode, runner.plan_prefill(lane, group, *slots_lens, rows, captured=True)))
        return planned

    def _recordable(self, lane: int, size: int, *, shares: bool) -> Callable[[], Tensor]:
        """The forward pass over the buffers, planned for padding alone."""
        attends = self._plan(lane, size, StepPlan(step_id=0), () if shares else None)
        tokens = self._tokens[size]

        def run() -> Tensor:
            groups = [
                GroupForward(rows=rows, decode=decode, prefill=prefill)
                for rows, (decode, prefill) in zip(tokens.cache_rows, attends, strict=True)
            ]
            fwd = Forward(
                num_decode=len(tokens.decode_slots),
                caches=self._runner.caches,
                groups=tuple(groups),
                padding=tokens.slots == self._state.num_slots,
                prefills_all=True,
            )
            return self._runner.model(tokens.ids, tokens.positions, fwd)

        return run
