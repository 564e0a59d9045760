"""The device's truth about each slot (length, last id, page tables), and a step's tokens made of it and of a plan.

Slots 0 .. num_slots - 1 belong to requests; slot `num_slots` is for padding rows: it owns no page, stays at length
0, and its page table points to the padding page.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from hornbeam.core.plan import Chunk, PageGrant, StepPlan
from hornbeam.ops.layout.contract import Layout, PlannedTokens, SlotTables, StepTokens
from hornbeam.sampling.sampler import Sampler

# Before the names of the sampler's parts in an upload, and of the planned tokens'.
_SAMPLER, _TOKENS = "sampler.", "tokens."


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A plan on the device: B decode rows, then C chunks of T tokens together. All int64."""

    tokens: PlannedTokens
    chunk_slots: Tensor  # [C]
    chunk_ends: Tensor  # [C]: length after the step
    sample_rows: Tensor  # [>= B + N]: of the step's B + T rows, those that sample, then padding: the first row
    logprob_rows: Tensor  # among the sampling rows, those that want logprobs
    score_rows: Tensor  # [P]: among the step's B + T rows, those that score the token behind them
    score_ids: Tensor  # [P]: these tokens
    score_slots: Tensor  # [P]


class SlotState:
    """Owned by the executor; lives on the device and changes in stream order."""

    def __init__(
        self,
        num_slots: int,
        num_groups: int,
        max_pages: int,
        page_size: int,
        sampler: Sampler,
        layout: Layout,
        device: torch.device,
        row_counts: Sequence[int],  # ascending, whose products are known: the library looks into others at first use
    ) -> None:
        self._row_counts = row_counts
        self.num_slots = num_slots
        self._tables = SlotTables(
            lens=torch.zeros(num_slots + 1, dtype=torch.int64, device=device),
            last_ids=torch.zeros(num_slots + 1, dtype=torch.int64, device=device),
            page_tables=torch.zeros((num_groups, num_slots + 1, max_pages), dtype=torch.int32, device=device),
            page_size=page_size,
        )
        self._sampler = sampler
        self._layout = layout

    @property
    def last_ids(self) -> Tensor:
        """[num_slots + 1] int64: what each slot goes on from."""
        return self._tables.last_ids

    @property
    def page_tables(self) -> Tensor:
        """[G, num_slots + 1, P] int32."""
        return self._tables.page_tables

    def apply(self, plan: StepPlan, upload: Callable[[Tensor], Tensor]) -> Batch:
        """Carry out the plan's starts with one upload, and return its batch."""
        packing: dict[str, np.ndarray] = {}
        self._pack_starts(plan, packing)
        self._pack_batch(plan, packing)
        packed = upload(torch.from_numpy(np.concatenate(list(packing.values()))))
        parts = dict(zip(packing, packed.split([len(array) for array in packing.values()]), strict=True))
        if plan.starts:
            slots = parts.pop("starts")
            self._tables.lens[slots] = parts.pop("cached")
            ours = [name for name in parts if name.startswith(_SAMPLER)]
            self._sampler.start({name.removeprefix(_SAMPLER): parts.pop(name) for name in ours})
        tokens = {name.removeprefix(_TOKENS): parts.pop(name) for name in [*parts] if name.startswith(_TOKENS)}
        return Batch(tokens=PlannedTokens(num_decode=len(plan.decode), **tokens), **parts)

    def padding(self, num_tokens: int, num_rows: int) -> StepTokens:
        """Memory for so many tokens and rows that decode, of padding alone."""
        none = self.last_ids[:0]
        planned = PlannedTokens(num_decode=0, slots=none, ids=none, positions=none, entries=none, pages=none)
        return self._laid_out(planned, num_tokens, num_rows)

    def tokens(self, batch: Batch) -> StepTokens:
        """What `lay_out` writes, in new memory and without padding."""
        return self._laid_out(batch.tokens, len(batch.tokens.slots), batch.tokens.num_decode)

    def lay_out(self, batch: Batch, out: StepTokens) -> None:
        """Carry out the plan's grants, write its tokens to `out`, and lengthen their slots."""
        self._layout.lay_out(batch.tokens, self._tables, out)

    def _laid_out(self, planned: PlannedTokens, num_tokens: int, num_rows: int) -> StepTokens:
        """Each tensor begins at a multiple of 16 bytes: for others kernels would be compiled anew, in service."""
        integers = self.last_ids.new_empty((3 + len(self.page_tables), num_tokens + num_tokens % 2))[:, :num_tokens]
        out = StepTokens(
            slots=integers[0],
            ids=integers[1],
            positions=integers[2],
            cache_rows=integers[3:],
            decode_slots=self.last_ids.new_empty(num_rows),
            decode_lens=self.last_ids.new_empty(num_rows, dtype=torch.int32),
        )
        self._layout.lay_out(planned, self._tables, out)
        return out

    def _pack_starts(self, plan: StepPlan, packing: dict[str, np.ndarray]) -> None:
        if plan.starts:
            packing["starts"] = _integers([start.slot for start in plan.starts])
            packing["cached"] = _integers([start.num_cached for start in plan.starts])
            for name, array in self._sampler.pack(plan.starts).items():
                packing[_SAMPLER + name] = array.reshape(-1).view(np.int64)

    def _pack_batch(self, plan: StepPlan, packing: dict[str, np.ndarray]) -> None:
        chunks, num_rows = plan.chunks, len(plan.decode)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        sizes = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
        slots = np.array([chunk.slot for chunk in chunks], dtype=np.int64)
        ends, row_ends = starts + sizes, sizes.cumsum()
        samples = np.array([chunk.samples for chunk in chunks], dtype=bool)
        packing[_TOKENS + "slots"] = np.concatenate((_integers(plan.decode), np.repeat(slots, sizes)))
        packing[_TOKENS + "ids"] = _integers(chain.from_iterable(chunk.token_ids for chunk in chunks))
        packing[_TOKENS + "positions"] = np.arange(sizes.sum()) + np.repeat(ends - row_ends, sizes)
        packing[_TOKENS + "entries"] = _integers(chain.from_iterable(map(self._entries, plan.grants)))
        packing[_TOKENS + "pages"] = _integers(chain.from_iterable(grant.page_ids for grant in plan.grants))
        packing["chunk_slots"] = slots
        packing["chunk_ends"] = ends
        rows = np.concatenate((np.arange(num_rows), num_rows + row_ends[samples] - 1))
        size = next((count for count in self._row_counts if count >= len(rows)), len(rows) or 1)  # kernels want some
        packing["sample_rows"] = np.pad(rows, (0, size - len(rows)))
        packing["logprob_rows"] = _integers(self._sampler.rows_with_logprobs(plan.sampling_slots))
        scored = [(chunk, num_rows + end) for chunk, end in zip(chunks, row_ends, strict=True) if chunk.scored_ids]
        packing["score_rows"] = _integers([row for chunk, end in scored for row in _score_rows(chunk, end)])
        packing["score_ids"] = _integers([token for chunk, _ in scored for token in chunk.scored_ids])
        packing["score_slots"] = _integers([chunk.slot for chunk, _ in scored for _ in chunk.scored_ids])

    def _entries(self, grant: PageGrant) -> range:
        """Places in all page tables, one behind the other."""
        _, num_slots, max_pages = self.page_tables.shape
        first = (grant.group * num_slots + grant.slot) * max_pages + grant.first
        return range(first, first + len(grant.page_ids))


def _integers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _score_rows(chunk: Chunk, end: int) -> range:
    """The rows before the tokens that `chunk` scores; `end`: the row behind its last one."""
    first = end - len(chunk.token_ids) + chunk.first_scored - 1 - chunk.start
    return range(first, first + len(chunk.scored_ids))
