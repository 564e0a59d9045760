"""Products of rounded activations with weights of four or eight bits, by kernels of our own; see `ops.native`."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.native.library import load_library, needs_library
from hornbeam.ops.query import OpQuery

_ALIGNMENT = 64  # bytes of a vector
_LANES = 16  # outputs of a tile


class _Weights(ctypes.Structure):
    """`struct weights` of products.c."""

    _fields_ = (("tiles", c_void_p), ("inputs", c_int64), ("outputs", c_int64), ("bits", c_int64))


class NativeGroupedWeight:
    """See `PackedWeight`."""

    def __init__(self, weight: Tensor) -> None:
        """Encode weight [N, K] float32: with four bits where these lose nothing."""
        library = load_library()
        weight = weight.detach().contiguous()
        self._product = library.hornbeam_product
        self._num_outputs, num_inputs = weight.shape
        for bits in (4, 8):
            self._weights = _Weights(inputs=num_inputs, outputs=self._num_outputs, bits=bits)
            self._address = ctypes.addressof(self._weights)
            if bits == 8 or library.hornbeam_fits(self._address, weight.data_ptr()):
                break
        self._tiles = torch.empty(library.hornbeam_packed_bytes(self._address) + _ALIGNMENT, dtype=torch.uint8)
        start = self._tiles.data_ptr()
        self._weights.tiles = start + -start % _ALIGNMENT
        library.hornbeam_pack(self._address, weight.data_ptr())

    @property
    def bits(self) -> int:
        """Of a weight, its group's numbers aside."""
        return int(self._weights.bits)

    def fuses(self, *, gated: bool) -> bool:
        """See `PackedWeight`."""
        return not gated or self._num_outputs % (2 * _LANES) == 0

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`."""
        out = x.new_empty((x.shape[0], self._num_outputs))
        self._run(x.contiguous(), None, None, bias, None, out, gated=False)
        return out

    def normed(
        self, x: Tensor, residual: Tensor | None, norm: InputNorm, bias: Tensor | None, *, gated: bool
    ) -> tuple[Tensor, Tensor]:
        """See `PackedWeight`."""
        x = x.contiguous()
        total = x if residual is None else torch.empty_like(x)
        out = x.new_empty((x.shape[0], self._num_outputs // 2 if gated else self._num_outputs))
        self._run(x, residual, norm, bias, total, out, gated=gated)
        return out, total

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: InputNorm | None,
        bias: Tensor | None,
        total: Tensor | None,
        out: Tensor,
        *,
        gated: bool,
    ) -> None:
        assert x.dtype == torch.float32
        assert residual is None or residual.is_contiguous()
        self._product(
            self._address,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            None if norm is None else norm.weight.data_ptr(),
            0.0 if norm is None else norm.eps,
            None if bias is None else bias.data_ptr(),
            None if total is None else total.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            gated,
        )


class NativeGrouped:
    """See `GroupedProduct`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs with the instructions that the kernels are written in, and a compiler."""
        return needs_library(query)

    def pack(self, weight: Tensor) -> NativeGroupedWeight:
        """See `GroupedProduct`."""
        return NativeGroupedWeight(weight)


BACKEND = NativeGrouped()
