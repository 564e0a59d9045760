"""The device tensors behind page numbers. Knows nothing of requests: who owns a page is `cache.pages`' business."""

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
                pages = tuple(
                    torch.empty((count, page_size, *shape), dtype=dtype, device=device) for shape in spec.row_shapes
                )
                if device.type != "cpu":
                    # Device kernels may multiply rows that nobody wrote by a weight of 0, and 0 * nan is nan. On a CPU
                    # only written rows are read, and memory that is not touched is not taken.
                    for tensor in pages:
                        tensor.zero_()
                self._layers[layer] = (group, pages)

    def layer(self, layer: int) -> tuple[int, tuple[Tensor, ...]]:
        """The cache group of a layer, and one tensor [P, S, *row_shape] per row shape."""
        return self._layers[layer]


def page_bytes(spec: CacheSpec, page_size: int) -> int:
    """Bytes of one page in all layers of the group."""
    return spec.bytes_per_token(getattr(torch, spec.dtype).itemsize) * page_size
