"""Norm, rotation and cache write on a CPU as one kernel of our own; see `ops.native`."""

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from hornbeam.ops.native.loader import load_library, needs_library
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.query import OpQuery

_LANES = 16  # floats of a vector


class _Store(ctypes.Structure):
    """`struct store` of attention.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "table", "positions", "k_pages", "v_pages", "places")),
        *((name, c_int64) for name in ("tokens", "heads", "kv_heads", "size", "rotated")),
        ("eps", c_float),
    )


class NativeQkv:
    """See `Qkv`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs, for heads of whole vectors."""
        if query.head_dim % _LANES:
            return f"needs heads of a multiple of {_LANES} features"
        return needs_library(query)

    def store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: Tensor,
    ) -> None:
        """See `Qkv`."""
        for x in (q, k, v):
            assert x.stride(2) == 1
            assert x.shape[1] == 1 or x.stride(1) == x.shape[2], "heads must follow each other"
        assert norms is None or norms.query.dtype == norms.key.dtype == torch.float32
        store = _Store(
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
            q_norm=None if norms is None else norms.query.data_ptr(),
            k_norm=None if norms is None else norms.key.data_ptr(),
            eps=0.0 if norms is None else norms.eps,
            table=None if rotation is None else rotation.table.data_ptr(),
            positions=None if rotation is None else rotation.positions.data_ptr(),
            rotated=0 if rotation is None else rotation.table.shape[1],
            k_pages=k_pages.data_ptr(),
            v_pages=v_pages.data_ptr(),
            places=rows.data_ptr(),
            tokens=len(q),
            heads=q.shape[1],
            kv_heads=k.shape[1],
            size=q.shape[2],
        )
        load_library().hornbeam_store(ctypes.addressof(store))


BACKEND = NativeQkv()
