"""Weights as int8 with one scale per output, for products with activations that are rounded row by row, to two terms.

Few features of a model are tens of times larger than the others, and rounding to one scale would leave the others few
bits. So both sides are rotated first, by the same Hadamard matrix in blocks of features: that spreads what is large
over its block and changes no product (QuaRot; Ashkboos et al., 2024).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hornbeam.ops.device import needs_cpu
from hornbeam.ops.linear.contract import INT8_LINEAR, Int8Product
from hornbeam.ops.linear.int8_reference import quantize_rows, two_terms
from hornbeam.ops.query import OpQuery

_BLOCK = 64  # larger ones round no better, and take longer to multiply with


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """M terms of which each weight is the sum: values [M N, K] int8, scales [M N] float32, term after term."""

    values: Tensor
    scales: Tensor
    num_terms: int
    rotation: Tensor  # [B, B], of each block of B features
    product: Int8Product

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`."""
        x = rotated(x, self.rotation)
        if self.num_terms == 1:
            return self.product.linear(x, self.values, self.scales, bias)
        terms = self.product.linear(x, self.values, self.scales, None)
        out = torch.sum(terms.view(len(x), self.num_terms, terms.shape[1] // self.num_terms), 1)
        return out if bias is None else out.add_(bias)


@dataclass(frozen=True, slots=True)
class Int8Packing:
    """See `Packing`."""

    product: Int8Product

    def pack(self, weight: Tensor, *, precise: bool = False) -> Int8Weight:
        """See `Packing`. The second term of a precise weight is what the first leaves."""
        rotation = hadamard(math.gcd(_BLOCK, weight.shape[1])).to(weight.device)
        values, scales = (two_terms if precise else quantize_rows)(rotated(weight.detach(), rotation))
        num_terms, scales = len(values) // len(weight), scales.squeeze(1)
        return Int8Weight(values=values, scales=scales, num_terms=num_terms, rotation=rotation, product=self.product)


class Int8Quantization:
    """See `Quantization`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs in float32."""
        return needs_cpu(query) if query.dtype == "float32" else "needs --dtype float32"

    def create(self, query: OpQuery) -> Int8Packing:
        """See `Quantization`."""
        return Int8Packing(INT8_LINEAR.choose(query, probe=partial(_probe, query)).value)


def hadamard(size: int) -> Tensor:
    """[size, size] float32, for a power of two: an orthogonal matrix of equal magnitudes (Sylvester's)."""
    matrix: Tensor = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.div_(size**0.5)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """[T, K], each block of B features times `rotation` [B, B]."""
    return (x.reshape(-1, len(rotation)) @ rotation).view(x.shape)


def _probe(query: OpQuery, product: Int8Product) -> None:
    size = query.num_heads * query.head_dim
    weight = Int8Packing(product).pack(torch.zeros(16, size))
    weight.linear(torch.zeros(2, size), None)


QUANTIZATION = Int8Quantization()
