"""The device tensors behind page numbers. Knows nothing of requests: who owns a page is `cache.pages`' business."""

import math

import numpy as np
import torch
from torch import Tensor

from hornbeam.core.cache_spec import CacheSpec


class CachePool:
    """For each cache group, pages 0 .. num_pages - 1 in every layer; page 0 takes the writes of padding rows."""

    def __init__(
        self, specs: tuple[CacheSpec, ...], num_pages: tuple[int, ...], page_size: int, device: torch.device
    ) -> None:
        self._layers: dict[int, tuple[int, tuple[Tensor, ...]]] = {}
        for group, (spec, count) in enumerate(zip(specs, num_pages, strict=True)):
            dtype = getattr(torch, spec.dtype)
            for layer in spec.layers:
                self._layers[layer] = (
                    group,
                    tuple(_zeros((count, page_size, *shape), dtype, device) for shape in spec.row_shapes),
                )

    def layer(self, layer: int) -> tuple[int, tuple[Tensor, ...]]:
        """The cache group of a layer, and one tensor [P, S, *row_shape] per row shape."""
        return self._layers[layer]


def page_bytes(spec: CacheSpec, page_size: int) -> int:
    """Bytes of one page in all layers of the group."""
    return spec.bytes_per_token(getattr(torch, spec.dtype).itemsize) * page_size


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kernels may multiply rows that nobody wrote by a weight of 0, and 0 * nan is nan.

    On a CPU memory that is not touched is not taken, so a large pool costs nothing before it is used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
