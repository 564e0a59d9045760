"""The device's truth about each slot (length, last id, page tables), and a step's batch made of it and of a plan.

Slots 0 .. num_slots - 1 belong to requests; slot `num_slots` is for padding rows: it owns no page, stays at length
0, and its page table points to the padding page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hornbeam.core.plan import Chunk, StepPlan
from hornbeam.sampling.sampler import Sampler

_SAMPLER = "sampler."  # before the names of the sampler's parts in an upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step on the device: B decode rows (padding included), then C chunks of T tokens together. All int64."""

    decode_slots: Tensor  # [B]
    chunk_ids: Tensor  # [T]
    chunk_positions: Tensor  # [T]
    chunk_token_slots: Tensor  # [T]
    chunk_slots: Tensor  # [C]
    chunk_ends: Tensor  # [C]: length after the step
    sample_rows: Tensor  # [B + N]: of the step's B + T rows, those that sample; the first one where none does
    sample_slots: Tensor  # [N]
    sample_positions: Tensor  # [N]: of the id to choose
    logprob_rows: Tensor  # among the sampling rows, those that want logprobs
    score_rows: Tensor  # [P]: among the step's B + T rows, those that score the token behind them
    score_ids: Tensor  # [P]: these tokens
    score_slots: Tensor  # [P]


class SlotState:
    """Owned by the executor; lives on the device and changes in stream order."""

    def __init__(
        self, num_slots: int, num_groups: int, max_pages: int, page_size: int, sampler: Sampler, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self.lens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)  # tokens in the cache
        self.last_ids = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.page_tables = tuple(
            torch.zeros((num_slots + 1, max_pages), dtype=torch.int32, device=device) for _ in range(num_groups)
        )
        self._page_size = page_size
        self._sampler = sampler

    def apply(self, plan: StepPlan, num_rows: int, upload: Callable[[Tensor], Tensor]) -> Batch:
        """Carry out the plan's starts and grants with one upload, and return its batch, decode padded to `num_rows`."""
        packing: dict[str, np.ndarray] = {}
        self._pack_deltas(plan, packing)
        self._pack_batch(plan, num_rows, packing)
        packed = upload(torch.from_numpy(np.concatenate(list(packing.values()))))
        parts = dict(zip(packing, packed.split([len(array) for array in packing.values()]), strict=True))
        if plan.starts:
            slots = parts.pop("starts")
            self.lens[slots] = parts.pop("cached")
            ours = [name for name in parts if name.startswith(_SAMPLER)]
            self._sampler.start({name.removeprefix(_SAMPLER): parts.pop(name) for name in ours})
        for group in {grant.group for grant in plan.grants}:
            self.page_tables[group].view(-1)[parts.pop(f"entries{group}")] = parts.pop(f"pages{group}").int()
        return Batch(**parts)

    def cache_rows(self, group: int, slots: Tensor, positions: Tensor) -> Tensor:
        """[T] int64: page * page size + offset, for tokens at `positions` [T] of `slots` [T]."""
        pages = self.page_tables[group][slots, positions // self._page_size]
        return pages.long() * self._page_size + positions % self._page_size

    def advance(self, slots: Tensor, lens: Tensor) -> None:
        """Set the lengths of `slots`; padding rows stay at 0."""
        self.lens[slots] = torch.where(slots == self.num_slots, 0, lens)

    def _pack_deltas(self, plan: StepPlan, packing: dict[str, np.ndarray]) -> None:
        if plan.starts:
            packing["starts"] = _integers([start.slot for start in plan.starts])
            packing["cached"] = _integers([start.num_cached for start in plan.starts])
            for name, array in self._sampler.pack(plan.starts).items():
                packing[_SAMPLER + name] = array.reshape(-1).view(np.int64)
        max_pages = self.page_tables[0].shape[1]
        for group in {grant.group for grant in plan.grants}:
            grants = [grant for grant in plan.grants if grant.group == group]
            firsts = ((grant.slot * max_pages + grant.first, grant.page_ids) for grant in grants)
            packing[f"entries{group}"] = _integers([first + i for first, ids in firsts for i in range(len(ids))])
            packing[f"pages{group}"] = _integers([page for grant in grants for page in grant.page_ids])

    def _pack_batch(self, plan: StepPlan, num_rows: int, packing: dict[str, np.ndarray]) -> None:
        chunks = plan.chunks
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        sizes = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
        slots = np.array([chunk.slot for chunk in chunks], dtype=np.int64)
        ends, row_ends = starts + sizes, sizes.cumsum()
        samples = np.array([chunk.samples for chunk in chunks], dtype=bool)
        packing["decode_slots"] = _integers(plan.decode + (self.num_slots,) * (num_rows - len(plan.decode)))
        packing["chunk_ids"] = _integers([token for chunk in chunks for token in chunk.token_ids])
        packing["chunk_positions"] = np.arange(sizes.sum()) + np.repeat(ends - row_ends, sizes)
        packing["chunk_token_slots"] = np.repeat(slots, sizes)
        packing["chunk_slots"] = slots
        packing["chunk_ends"] = ends
        rows = np.concatenate((np.arange(num_rows), num_rows + row_ends[samples] - 1))
        packing["sample_rows"] = rows if len(rows) else np.zeros(1, dtype=np.int64)  # as kernels want some row
        packing["sample_slots"] = slots[samples]
        packing["sample_positions"] = ends[samples]
        packing["logprob_rows"] = _integers(self._sampler.rows_with_logprobs(plan.sampling_slots))
        scored = [(chunk, num_rows + end) for chunk, end in zip(chunks, row_ends, strict=True) if chunk.scored_ids]
        packing["score_rows"] = _integers([row for chunk, end in scored for row in _score_rows(chunk, end)])
        packing["score_ids"] = _integers([token for chunk, _ in scored for token in chunk.scored_ids])
        packing["score_slots"] = _integers([chunk.slot for chunk, _ in scored for _ in chunk.scored_ids])


def _integers(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _score_rows(chunk: Chunk, end: int) -> range:
    """The rows before the tokens that `chunk` scores; `end`: the row behind its last one."""
    first = end - len(chunk.token_ids) + chunk.first_scored - 1 - chunk.start
    return range(first, first + len(chunk.scored_ids))
