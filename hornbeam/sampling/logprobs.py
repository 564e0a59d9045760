"""Log-probabilities of rows of logits: computed on the device in blocks of rows, read on the host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hornbeam.core.request import LogprobOptions, TokenLogprobs
from hornbeam.ops.sample.contract import Sample
from hornbeam.sampling.lists import SlotLists, padded

# Rows whose logits are in memory at once: this bounds the memory that scoring a long prompt takes.
BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogprobs:
    """N rows, of the raw distribution, as much as any row's options ask for: K of the likeliest, W tokens asked for."""

    options: Sequence[LogprobOptions]  # by row
    chosen: Tensor  # [N], of the given tokens
    top_ids: Tensor  # [N, K]
    top: Tensor  # [N, K]
    asked: Tensor  # [N, W]

    def download(self) -> "RowLogprobs":
        """The same on the CPU, without waiting: valid once the device has done what was enqueued so far."""
        names = ("chosen", "top_ids", "top", "asked")
        return replace(self, **{name: getattr(self, name).to("cpu", non_blocking=True) for name in names})

    def read(self) -> list[TokenLogprobs]:
        """One value per row, with what its options ask for."""
        chosen, top_ids = self.chosen.tolist(), self.top_ids.tolist()
        top, asked = self.top.tolist(), self.asked.tolist()
        return [
            TokenLogprobs(
                chosen=chosen[row],
                top=tuple(zip(top_ids[row], top[row], strict=True))[: wanted.num_top],
                asked=tuple(asked[row][: len(wanted.token_ids)]),
            )
            for row, wanted in enumerate(self.options)
        ]


class Logprobs:
    """The tokens whose log-probabilities each slot's request asks for, and how all of them are computed."""

    def __init__(self, num_slots: int, op: Sample, device: torch.device) -> None:
        self._op = op
        self._asked_ids = SlotLists(num_slots, torch.int64, device)

    @staticmethod
    def pack(options: Mapping[int, LogprobOptions]) -> dict[str, np.ndarray]:
        """What `start` must be given of what the slots' requests want, as arrays of 64-bit numbers."""
        return {"slots": np.array([*options]), "asked_ids": padded([wanted.token_ids for wanted in options.values()])}

    def start(self, slots: Tensor, asked_ids: Tensor) -> None:
        """Set on the device what `pack` has packed."""
        self._asked_ids.put(slots, asked_ids)

    def score(
        self,
        logits_of: Callable[[Tensor], Tensor],
        rows: Tensor,
        ids: Tensor,
        slots: Tensor,
        options: Sequence[LogprobOptions],
    ) -> RowLogprobs:
        """Log-probabilities of N rows.

        Args:
            logits_of: some of `rows` -> their logits [n, V].
            rows: [N] int64, N > 0.
            ids: [N] int64, the token of each row.
            slots: [N] int64.
            options: of each row.
        """
        num_top, asked_ids = max(wanted.num_top for wanted in options), self._asked_ids[slots]
        blocks = []
        for begin in range(0, len(rows), BLOCK_ROWS):
            block = slice(begin, begin + BLOCK_ROWS)
            logits, wanted = logits_of(rows[block]), torch.cat((ids[block].unsqueeze(1), asked_ids[block]), 1)
            of_ids, top_ids, top = self._op.logprobs(logits, wanted, min(num_top, logits.shape[1]))
            blocks.append((of_ids[:, 0], top_ids, top, of_ids[:, 1:]))
        chosen, top_ids, top, asked = map(torch.cat, zip(*blocks, strict=True))
        return RowLogprobs(options=options, chosen=chosen, top_ids=top_ids, top=top, asked=asked)


def rows_of(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What `Logprobs.score` wants of logits [R, V] that are there: different rows of them, or all, uncopied."""
    return lambda rows: logits if len(rows) == len(logits) else logits[rows]
