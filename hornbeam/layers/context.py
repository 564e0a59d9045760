"""What a model is built with: its share of the work, the number format, and the kernels."""

from dataclasses import dataclass

import torch

from hornbeam.comm.grid import Grid
from hornbeam.ops.kernels import Kernels
from hornbeam.quant.contract import Packing


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Passed to every layer's constructor; parameters are created empty on `device`."""

    grid: Grid
    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    context_len: int  # positions that may occur
    packing: Packing | None = None  # how products keep their weights; None: as they are loaded
