"""Calls of products.c: one product, with what may be fused around it."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.native.loader import load_library

LANES = 16  # outputs of a tile; a gate's outputs must fill whole ones


class Weights(ctypes.Structure):
    """`struct weights`: a matrix [outputs, inputs] of so many bits a number; `data` must outlive it."""

    _fields_ = (("data", c_void_p), ("inputs", c_int64), ("outputs", c_int64), ("bits", c_int64))


def product(
    weights: Weights,
    x: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    norm: InputNorm | None = None,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """The result of a product [T, N], or of a gated one [T, N / 2], and x + residual; see `LinearProduct`.

    All tensors are float32; `x` [T, K] may be strided, the others not.
    """
    assert x.dtype == torch.float32
    assert residual is None or residual.is_contiguous()
    x = x.contiguous()
    total = x if residual is None else torch.empty_like(x)
    out = x.new_empty((x.shape[0], weights.outputs // 2 if gated else weights.outputs))
    load_library().hornbeam_product(
        ctypes.addressof(weights),
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if norm is None else norm.weight.data_ptr(),
        0.0 if norm is None else norm.eps,
        None if bias is None else bias.data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        gated,
    )
    return out, total
