"""A binding of cuBLASLt, which unlike cuBLAS lets its caller choose the algorithm of a product.

Algorithms are opaque: 64 bytes, which mean the same to the same version of the library. Knows nothing of which is fast.
"""

import ctypes
from collections.abc import Iterator
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_WORKSPACE_BYTES = 32 * 2**20
_MOST_OFFERS = 16
_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
_COMPUTE_FLOAT32, _FLOAT32 = 68, 0
_TRANSPOSED_A = 3  # attribute of a product
_BATCH_SIZE, _BATCH_STRIDE = 5, 6  # attributes of a layout
_WORKSPACE, _REDUCTIONS = 1, 3  # attributes of a preference
_SUMS_IN_FLOAT32 = 2  # of the ways to reduce split sums the one that does not round in between

Algorithm = bytes


@dataclass(frozen=True, slots=True)
class Setting:
    """An attribute of algorithms, and values that it may have."""

    attribute: int
    type: type[c_uint16] | type[c_uint32]
    values: tuple[int, ...]


CLUSTER_SHAPES = Setting(8, c_uint16, (2, 3, 4, 5, 6, 7, 8))  # of thread blocks: 1x1, 2x1, 4x1, 1x2, 2x2, 4x2, 1x4
SWIZZLES = Setting(4, c_uint32, (1, 2, 3))  # orders in which tiles are computed


class _Offer(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasLt:
    """The library, opened once for a device. Products run on torch's current stream, one after the other."""

    def __init__(self, device: torch.device) -> None:
        """Open the library that torch has loaded.

        Raises:
            OSError: it is not there.
        """
        assert torch.version.cuda is not None
        self._library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")
        self._library.cublasLtGetVersion.restype = c_size_t
        pointers = [c_void_p] * 12
        self._library.cublasLtMatmul.argtypes = [*pointers, c_void_p, c_void_p, c_size_t, c_void_p]
        self.version = int(self._library.cublasLtGetVersion())
        self._handle = c_void_p()
        self._call("Create", byref(self._handle))
        self._product = c_void_p()
        self._call("MatmulDescCreate", byref(self._product), c_int(_COMPUTE_FLOAT32), c_int(_FLOAT32))
        transposed = c_int32(1)
        self._call("MatmulDescSetAttribute", self._product, c_int(_TRANSPOSED_A), byref(transposed), c_size_t(4))
        self._preference = c_void_p()
        self._call("MatmulPreferenceCreate", byref(self._preference))
        for attribute, value in ((_WORKSPACE, c_size_t(_WORKSPACE_BYTES)), (_REDUCTIONS, c_uint32(_SUMS_IN_FLOAT32))):
            size = c_size_t(ctypes.sizeof(value))
            self._call("MatmulPreferenceSetAttribute", self._preference, c_int(attribute), byref(value), size)
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._one, self._zero = c_float(1), c_float(0)
        self._layout = cache(self._make_layout)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, f"cublasLt{name}")(*arguments)
        if status:
            raise RuntimeError(f"cublasLt{name} returned {status}")

    def _make_layout(
        self, dtype: torch.dtype, num_features: int, num_rows: int, stride: int, num_parts: int, part_stride: int
    ) -> c_void_p:
        """Of row-major matrices, which the library calls column-major ones of their transposes."""
        layout = c_void_p()
        sizes = c_uint64(num_features), c_uint64(num_rows), c_int64(stride)
        self._call("MatrixLayoutCreate", byref(layout), c_int(_DTYPES[dtype]), *sizes)
        for attribute, value in ((_BATCH_SIZE, c_int32(num_parts)), (_BATCH_STRIDE, c_int64(part_stride))):
            size = c_size_t(ctypes.sizeof(value))
            self._call("MatrixLayoutSetAttribute", layout, c_int(attribute), byref(value), size)
        return layout

    def _layouts(self, x: Tensor, weight: Tensor, num_parts: int) -> tuple[c_void_p, c_void_p, c_void_p]:
        (num_rows, num_in), num_out = x.shape, weight.shape[0]
        assert num_in % num_parts == 0
        stretch = num_in // num_parts
        return (
            self._layout(x.dtype, stretch, num_out, weight.stride(0), num_parts, stretch),
            self._layout(x.dtype, stretch, num_rows, x.stride(0), num_parts, stretch),
            self._layout(_out_dtype(x, num_parts), num_out, num_rows, num_out, num_parts, num_rows * num_out),
        )

    def offers(self, x: Tensor, weight: Tensor, num_parts: int = 1) -> list[Algorithm]:
        """What the library thinks fit for `linear` of x [T, K] and weight [N, K]; its favourite first."""
        of_weight, of_x, of_out = self._layouts(x, weight, num_parts)
        offers, num_offers = (_Offer * _MOST_OFFERS)(), c_int()
        layouts = of_weight, of_x, of_out, of_out
        arguments = self._product, *layouts, self._preference, c_int(_MOST_OFFERS), offers, byref(num_offers)
        try:
            self._call("MatmulAlgoGetHeuristic", self._handle, *arguments)
        except RuntimeError:
            return []
        return [bytes(offer.algorithm) for offer in offers[: num_offers.value] if offer.status == 0]

    def variants(
        self, x: Tensor, weight: Tensor, algorithm: Algorithm, setting: Setting, num_parts: int = 1
    ) -> Iterator[Algorithm]:
        """The algorithm with other values of a setting, where the library allows them."""
        for number in setting.values:
            variant = (c_uint64 * 8).from_buffer_copy(algorithm)
            attribute, value = c_int(setting.attribute), setting.type(number)
            size = c_size_t(ctypes.sizeof(value))
            try:
                self._call("MatmulAlgoConfigSetAttribute", variant, attribute, byref(value), size)
            except RuntimeError:
                continue
            if bytes(variant) != algorithm and self.allows(x, weight, bytes(variant), num_parts):
                yield bytes(variant)

    def allows(self, x: Tensor, weight: Tensor, algorithm: Algorithm, num_parts: int = 1) -> bool:
        """Whether the algorithm can do `linear`."""
        of_weight, of_x, of_out = self._layouts(x, weight, num_parts)
        layouts, checked = (self._product, of_weight, of_x, of_out, of_out), _Offer()
        try:
            copied = (c_uint64 * 8).from_buffer_copy(algorithm)
            self._call("MatmulAlgoCheck", self._handle, *layouts, copied, byref(checked))
        except (RuntimeError, ValueError):  # ValueError: it is too short to be one
            return False
        return bool(checked.workspace_bytes <= _WORKSPACE_BYTES)

    def linear(
        self, x: Tensor, weight: Tensor, algorithm: Algorithm, residual: Tensor | None = None, num_parts: int = 1
    ) -> Tensor:
        """x [T, K] and weight [N, K] in half precision, with adjacent features -> x W^T, [T, N].

        residual: [T, N]; the product is added to it in place.
        num_parts: above 1, the sums over so many equal stretches of the inputs are left apart: [parts, T, N] float32.

        Raises:
            RuntimeError: the algorithm cannot do it.
        """
        assert x.stride(1) == weight.stride(1) == 1
        assert residual is None or (residual.is_contiguous() and num_parts == 1)
        shape = (x.shape[0], weight.shape[0]) if num_parts == 1 else (num_parts, x.shape[0], weight.shape[0])
        out = residual
        if out is None:
            out = torch.empty(shape, dtype=_out_dtype(x, num_parts), device=x.device)
        of_weight, of_x, of_out = self._layouts(x, weight, num_parts)
        status = self._library.cublasLtMatmul(
            self._handle,
            self._product,
            ctypes.addressof(self._one),
            weight.data_ptr(),
            of_weight,
            x.data_ptr(),
            of_x,
            ctypes.addressof(self._zero if residual is None else self._one),
            out.data_ptr(),
            of_out,
            out.data_ptr(),
            of_out,
            algorithm,
            self._workspace.data_ptr(),
            _WORKSPACE_BYTES,
            torch.cuda.current_stream(x.device).cuda_stream,
        )
        if status:
            raise RuntimeError(f"cublasLtMatmul returned {status}")
        return out


def _out_dtype(x: Tensor, num_parts: int) -> torch.dtype:
    return x.dtype if num_parts == 1 else torch.float32
