"""What is added to the logits of single tokens: a request's own biases, and bans until it may end."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hornbeam.core.plan import SlotStart
from hornbeam.sampling.lists import SlotLists, padded

_NEVER = 2**62  # a position that no request reaches


class Biases:
    """By slot: (token id, bias, position at which it ends)."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._ids = SlotLists(num_slots, torch.int64, device)
        self._values = SlotLists(num_slots, torch.float32, device)
        self._ends = SlotLists(num_slots, torch.int64, device)

    def pack(self, starts: Sequence[SlotStart]) -> dict[str, np.ndarray]:
        """What `start` must be given of requests that have biases, as arrays of 64-bit numbers."""
        rows = [_entries(start) for start in starts]
        ids, values, ends = (padded([[entry[column] for entry in row] for row in rows]) for column in range(3))
        return {
            "slots": np.array([start.slot for start in starts]),
            "ids": ids,
            "values": values.astype(np.float64),
            "ends": ends,
        }

    def start(self, slots: Tensor, ids: Tensor, values: Tensor, ends: Tensor) -> None:
        """Set on the device what `pack` has packed."""
        self._ids.put(slots, ids)
        self._values.put(slots, values.view(torch.float64))
        self._ends.put(slots, ends)

    def add(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """[R, V] float32, new, from logits [R, V] of `slots` [R], for ids at `positions` [R]."""
        values = torch.where(positions.unsqueeze(1) < self._ends[slots], self._values[slots], 0.0)
        return logits.to(torch.float32, copy=True).scatter_add_(1, self._ids[slots], values)


def _entries(start: SlotStart) -> list[tuple[int, float, int]]:
    biases = [(token_id, bias, _NEVER) for token_id, bias in start.sampling.logit_bias]
    return biases + [(token_id, -math.inf, start.banned_until) for token_id in start.banned_ids]
