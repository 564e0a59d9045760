"""Products of rounded activations with weights of four or eight bits, by kernels of our own; see `ops.native`."""

import ctypes

import torch
from torch import Tensor

from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.linear.native_product import LANES, Weights, product
from hornbeam.ops.native.loader import load_library, needs_library
from hornbeam.ops.query import OpQuery

_ALIGNMENT = 64  # bytes of a vector


class NativeGroupedWeight:
    """See `PackedWeight`."""

    def __init__(self, weight: Tensor) -> None:
        """Encode weight [N, K] float32: with four bits where these lose nothing."""
        library = load_library()
        weight = weight.detach().contiguous()
        num_outputs, num_inputs = weight.shape
        for bits in (4, 8):
            self._weights = Weights(inputs=num_inputs, outputs=num_outputs, bits=bits)
            address = ctypes.addressof(self._weights)
            if bits == 8 or library.hornbeam_fits(address, weight.data_ptr()):
                break
        self._tiles = torch.empty(library.hornbeam_packed_bytes(address) + _ALIGNMENT, dtype=torch.uint8)
        start = self._tiles.data_ptr()
        self._weights.data = start + -start % _ALIGNMENT
        library.hornbeam_pack(address, weight.data_ptr())

    @property
    def bits(self) -> int:
        """Of a weight, its group's numbers aside."""
        return int(self._weights.bits)

    def fuses(self, *, gated: bool) -> bool:
        """See `PackedWeight`."""
        return not gated or self._weights.outputs % (2 * LANES) == 0

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`."""
        return product(self._weights, x, bias)[0]

    def normed(
        self, x: Tensor, residual: Tensor | None, norm: InputNorm, bias: Tensor | None, *, gated: bool
    ) -> tuple[Tensor, Tensor]:
        """See `PackedWeight`."""
        return product(self._weights, x, bias, residual=residual, norm=norm, gated=gated)


class NativeGrouped:
    """See `GroupedProduct`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs with the instructions that the kernels are written in, and a compiler."""
        return needs_library(query)

    def pack(self, weight: Tensor) -> NativeGroupedWeight:
        """See `GroupedProduct`."""
        return NativeGroupedWeight(weight)


BACKEND = NativeGrouped()
