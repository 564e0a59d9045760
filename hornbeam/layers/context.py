"""What a model is built with: its share of the work, the number format, and the kernels."""

from dataclasses import dataclass

import torch

from hornbeam.comm.grid import Grid
from hornbeam.core.fp8 import Fp8Format
from hornbeam.ops.kernels import Kernels
from hornbeam.ops.linear.contract import GroupedProduct


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Passed to every layer's constructor; parameters are created empty on `device`."""

    grid: Grid
    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    context_len: int  # positions that may occur
    fp8: Fp8Format | None = None  # of the weights of products; None: they are as `dtype` says
    packing: GroupedProduct | None = None  # how products keep their weights; None: as they are loaded
