"""Products in bfloat16 within a model in float32: half the memory to read, on CPUs that multiply such numbers.

Weights are laid out once as oneDNN reads them. The head's logits must not be rounded to eight bits, which would make
likely tokens equal: it is kept as int8 of two terms, whose sums are float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hornbeam.ops.device import needs_cpu
from hornbeam.ops.query import OpQuery
from hornbeam.quant.contract import PackedWeight, Packing
from hornbeam.quant.int8 import QUANTIZATION as INT8


@dataclass(frozen=True, slots=True)
class Bf16Weight:
    """A weight as oneDNN lays it out."""

    values: Tensor  # [N, K] bfloat16, opaque

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.values, None, "none", [], "")
        out = product.float()
        return out if bias is None else out.add_(bias)


@dataclass(frozen=True, slots=True)
class Bf16Packing:
    """See `Packing`."""

    head: Packing

    def pack(self, weight: Tensor, *, precise: bool = False) -> PackedWeight:
        """See `Packing`."""
        if precise:
            return self.head.pack(weight, precise=True)
        return Bf16Weight(torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16().contiguous()))


class Bf16Quantization:
    """See `Quantization`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs with AVX512-BF16, in float32."""
        if query.dtype != "float32":
            return "needs --dtype float32"
        if reason := needs_cpu(query):
            return reason
        return None if torch.cpu._is_avx512_bf16_supported() else "needs a CPU with AVX512-BF16"

    def create(self, query: OpQuery) -> Packing:
        """See `Quantization`."""
        return Bf16Packing(INT8.create(query))


QUANTIZATION = Bf16Quantization()
