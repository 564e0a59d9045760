"""Penalties for tokens that a request has seen, and the table of how often each slot has seen each token."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hornbeam.core.plan import SlotStart
from hornbeam.ops.sample.contract import GENERATED, Sample


class Penalties:
    """One row of the table per slot, made when the first request with penalties starts.

    Rows of slots without penalties hold anything, and change nothing.
    """

    def __init__(self, num_slots: int, vocab_size: int, op: Sample, device: torch.device) -> None:
        self._shape = (num_slots, vocab_size)
        self._op = op
        self._device = device
        self._counts: Tensor | None = None

    @staticmethod
    def pack(starts: Sequence[SlotStart]) -> dict[str, np.ndarray]:
        """What `start` must be given of requests that have penalties, as arrays of 64-bit numbers."""
        seen = [(start.slot, *entry) for start in starts for entry in _seen(start)]
        slots, ids, counts = np.array(seen).T
        return {"cleared": np.array([start.slot for start in starts]), "slots": slots, "ids": ids, "counts": counts}

    def start(self, cleared: Tensor, slots: Tensor, ids: Tensor, counts: Tensor) -> None:
        """Set on the device what `pack` has packed."""
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        self._counts[cleared] = 0
        self._counts[slots, ids] = counts.int()

    def apply(self, logits: Tensor, slots: Tensor, numbers: Tensor) -> Tensor:
        """[R, V] float32, new, from logits [R, V] of `slots` [R]; numbers [3, R]: see `Sample.penalize`."""
        assert self._counts is not None, "no request with penalties has started"
        repetition, frequency, presence = numbers
        return self._op.penalize(logits, slots, self._counts, repetition, frequency, presence)

    def count(self, slots: Tensor, ids: Tensor) -> None:
        """`ids` [R] were generated in `slots` [R], which are different ones but for padding."""
        assert self._counts is not None, "no request with penalties has started"
        self._counts[slots, ids] += GENERATED


def _seen(start: SlotStart) -> list[tuple[int, int]]:
    """(token id, entry of the table) of what the request has seen before it starts; its prompt is not empty."""
    generated, prompt = Counter(start.generated_ids), set(start.prompt_ids)
    return [
        (token_id, GENERATED * generated[token_id] + (token_id in prompt)) for token_id in prompt | generated.keys()
    ]
