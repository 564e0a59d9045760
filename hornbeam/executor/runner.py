"""The forward pass of a step, launched layer by layer: plans attention, lays out the rows, calls the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hornbeam.cache.pool import CachePool
from hornbeam.core.plan import SharedPrefix, StepPlan
from hornbeam.executor.state import Batch, SlotState
from hornbeam.layers.forward import Forward, GroupForward, LayerCache
from hornbeam.ops.attention.contract import Attend, Attention, LatentAttend, Rows

NUM_LANES = 2


class Model(Protocol):
    """What a family's `build` returns, as far as steps are concerned."""

    def __call__(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAttention:
    """The attention of one cache group in one lane; each may be done by another backend."""

    single: Attention  # decode of one row alone
    decode: Attention
    prefill: Attention


class Runner:
    """`attention[lane][group]`: each lane has its own instances.

    `least_shared[group]`: tokens that shared prefixes must save per step for the group to read them once; None: never.
    """

    def __init__(
        self,
        model: Model,
        num_layers: int,
        state: SlotState,
        attention: Sequence[Sequence[GroupAttention]],
        least_shared: Sequence[int | None],
    ) -> None:
        self.model = model
        self._num_layers = num_layers
        self._state = state
        self._attention = attention
        self._least_shared = least_shared
        self._caches: tuple[LayerCache, ...] = ()

    def use_pool(self, pool: CachePool) -> None:
        """Read and write the tensors of `pool` from now on."""
        layers = (pool.layer(layer) for layer in range(self._num_layers))
        self._caches = tuple(LayerCache(group=group, tensors=tensors) for group, tensors in layers)

    @property
    def shares(self) -> bool:
        """Whether any group can read shared prefixes once."""
        return any(least is not None for least in self._least_shared)

    def worth_sharing(self, plan: StepPlan) -> tuple[SharedPrefix, ...] | None:
        """The shared prefixes of a step, if reading them once pays; else None."""
        saved = sum((len(prefix.rows) - 1) * prefix.num_tokens for prefix in plan.shared)
        pays = any(least is not None and saved >= least for least in self._least_shared)
        return plan.shared if pays else None

    def run(self, lane: int, plan: StepPlan, batch: Batch) -> Tensor:
        """Hidden rows [B + T, H] of the step: the decode rows, then those of chunks."""
        num_decode = len(batch.decode_slots)
        slots = torch.cat((batch.decode_slots, batch.chunk_token_slots))
        decode_positions = self._state.lens[batch.decode_slots]
        positions = torch.cat((decode_positions, batch.chunk_positions))
        ids = torch.cat((self._state.last_ids[batch.decode_slots], batch.chunk_ids))
        groups, shared = [], self.worth_sharing(plan)
        for group in range(len(self._state.page_tables)):
            decode = prefill = None
            if plan.decode:
                lens = (decode_positions + 1).int()
                slots_lens = batch.decode_slots, lens
                decode = self.plan_decode(lane, group, *slots_lens, plan.decode_lens, shared, captured=False)
            if plan.chunks:
                prefill = self._plan_prefill(lane, group, plan, batch)
            rows = self._state.cache_rows(group, slots, positions)
            groups.append(GroupForward(rows=rows, decode=decode, prefill=prefill))
        return self.model(ids, positions, self.forward(num_decode, groups))

    def logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Logits [R, V] of the rows that sample: the decode rows, then the last rows of chunks."""
        num_decode = len(batch.decode_slots)
        return self.model.logits(torch.cat((hidden[:num_decode], hidden[batch.sample_rows])))

    def forward(self, num_decode: int, groups: Sequence[GroupForward], padding: Tensor | None = None) -> Forward:
        """What the layers get to see."""
        return Forward(num_decode=num_decode, caches=self._caches, groups=tuple(groups), padding=padding)

    def plan_decode(
        self,
        lane: int,
        group: int,
        slots: Tensor,
        lens: Tensor,
        len_bounds: Sequence[int],
        shared: tuple[SharedPrefix, ...] | None,
        *,
        captured: bool,
    ) -> Attend | LatentAttend:
        """Attention of rows with one query each; rows beyond `len_bounds` are padding, of length 1."""
        padding = len(slots) - len(len_bounds)
        rows = Rows(
            page_tables=self._state.page_tables[group],
            slots=slots,
            lens=lens,
            len_bounds=(*len_bounds, *(1,) * padding),
            query_lens=(1,) * len(slots),
            shared=None if self._least_shared[group] is None else shared,
            captured=captured,
        )
        attention = self._attention[lane][group]
        return (attention.single if len(slots) == 1 else attention.decode).plan_decode(rows)

    def _plan_prefill(self, lane: int, group: int, plan: StepPlan, batch: Batch) -> Attend | LatentAttend:
        rows = Rows(
            page_tables=self._state.page_tables[group],
            slots=batch.chunk_slots,
            lens=batch.chunk_ends.int(),
            len_bounds=[chunk.start + len(chunk.token_ids) for chunk in plan.chunks],
            query_lens=[len(chunk.token_ids) for chunk in plan.chunks],
            fresh=True,
        )
        return self._attention[lane][group].prefill.plan_prefill(rows)
