"""Lists of numbers per slot that stay on the device: of any length, one row each, padded with zeros."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """[N, W] float64 or int64, from N rows of any lengths; zeros fill them up."""
    width = max(1, *map(len, rows))
    return np.array([[*row, *(0,) * (width - len(row))] for row in rows])


class SlotLists:
    """[slots, width]; the width grows to the longest list that was ever put in, in powers of two."""

    def __init__(self, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.zeros((num_slots, 1), dtype=dtype, device=device)

    def put(self, slots: Tensor, flat: Tensor) -> None:
        """Replace the lists of `slots` [N] by the N rows of one length that `flat` holds."""
        rows = flat.view(len(slots), -1).to(self._rows.dtype)
        num_slots, before = self._rows.shape
        width = rows.shape[1]
        if width > before:
            wider = self._rows.new_zeros((num_slots, 1 << (width - 1).bit_length()))
            wider[:, :before] = self._rows
            self._rows = wider
        self._rows[slots] = 0
        self._rows[slots, :width] = rows

    def __getitem__(self, slots: Tensor) -> Tensor:
        """[N, width] of `slots` [N]."""
        return self._rows[slots]
