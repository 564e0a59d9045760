"""The forward pass of a step, launched layer by layer: plans attention, lays out the rows, calls the model."""

from collections.abc import Sequence

from torch import Tensor

from hornbeam.cache.pool import CachePool
from hornbeam.core.plan import SharedPrefix, StepPlan
from hornbeam.executor.state import Batch, SlotState
from hornbeam.layers.forward import Forward, GroupForward, LayerCache, Model
from hornbeam.ops.attention.contract import Attend, GroupAttention, LatentAttend, Rows
from hornbeam.ops.layout.contract import StepTokens

NUM_LANES = 2


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
        self.caches: tuple[LayerCache, ...] = ()  # what the layers read and write

    def use_pool(self, pool: CachePool) -> None:
        """Read and write the tensors of `pool` from now on."""
        layers = (pool.layer(layer) for layer in range(self._num_layers))
        self.caches = tuple(LayerCache(group=group, tensors=tensors) for group, tensors in layers)

    @property
    def shares(self) -> bool:
        """Whether any group can read shared prefixes once."""
        return any(least is not None for least in self._least_shared)

    def worth_sharing(self, plan: StepPlan) -> tuple[SharedPrefix, ...] | None:
        """The shared prefixes of a step, if reading them once pays; else None."""
        saved = sum((len(prefix.rows) - 1) * prefix.num_tokens for prefix in plan.shared)
        pays = any(least is not None and saved >= least for least in self._least_shared)
        return plan.shared if pays else None

    def run(self, lane: int, plan: StepPlan, batch: Batch, tokens: StepTokens, wanted: Tensor | None) -> Tensor:
        """Hidden rows of the tokens `wanted`, [R] int64 among the B + T of the step: decode rows, then those of chunks.

        None: of all.
        """
        groups, shared = [], self.worth_sharing(plan)
        for group, rows in enumerate(tokens.cache_rows):
            decode = prefill = None
            if plan.decode:
                slots_lens = tokens.decode_slots, tokens.decode_lens
                decode = self.plan_decode(lane, group, *slots_lens, plan.decode_lens, shared, captured=False)
            if plan.chunks:
                chunks = [(chunk.end, len(chunk.token_ids)) for chunk in plan.chunks]
                slots_lens = batch.chunk_slots, batch.chunk_ends.int()
                prefill = self.plan_prefill(lane, group, *slots_lens, chunks, captured=False)
            groups.append(GroupForward(rows=rows, decode=decode, prefill=prefill))
        fwd = Forward(num_decode=len(plan.decode), caches=self.caches, groups=tuple(groups), wanted=wanted)
        return self.model(tokens.ids, tokens.positions, fwd)

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

    def plan_prefill(
        self, lane: int, group: int, slots: Tensor, lens: Tensor, chunks: Sequence[tuple[int, int]], *, captured: bool
    ) -> Attend | LatentAttend:
        """Attention of rows with any numbers of queries; `chunks` has each one's length after the step, and queries."""
        rows = Rows(
            page_tables=self._state.page_tables[group],
            slots=slots,
            lens=lens,
            len_bounds=[end for end, _ in chunks],
            query_lens=[num_queries for _, num_queries in chunks],
            fresh=not captured,
            captured=captured,
        )
        return self._attention[lane][group].prefill.plan_prefill(rows)
