"""Linear maps, the only layers with large weights: dense products, the embedding table and the head.

Weights are loaded into parameters. Where the machine computes with another encoding of them, `refresh_derived` makes
it, and frees the parameter if nobody else reads it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.parameters import empty_parameter, freed, plain_weight, weight_parameters
from hornbeam.ops.linear.contract import Fp8Weight, InputNorm, PackedWeight


class Linear(nn.Module):
    """y = x W^T + b, with one or several fused parts along the outputs.

    `parts` holds the rows of each part on this rank: checkpoint part i fills rows sum(parts[:i]) onward. `split` says
    which side is shared out over the tensor-parallel ranks, if one is; "in" needs a sum over ranks afterwards.
    `quantized`: where the model's products have eight-bit weights, this one has, too; `scales` are those of its blocks.
    """

    def __init__(
        self,
        in_features: int,
        parts: tuple[int, ...],
        context: BuildContext,
        *,
        bias: bool = False,
        split: Literal["out", "in", "none"],
        quantized: bool = True,
    ) -> None:
        super().__init__()
        axis = context.grid.attn_tp
        if split == "in":
            in_features = axis.share(in_features, "input features")
        elif split == "out":
            parts = tuple(axis.share(part, "output features") for part in parts)
        self.parts = parts
        self.quantized = quantized
        self.weight, self.scales = weight_parameters((), parts, in_features, context, quantized=quantized)
        self.bias = empty_parameter((sum(parts),), context) if bias else None
        self.product = context.kernels.linear
        self._activation = context.kernels.activation
        self._fp8 = context.kernels.fp8_linear if self.scales is not None else None
        self._power_of_two = context.fp8 is not None and context.fp8.power_of_two
        self._packing = context.packing
        self._packed: PackedWeight | None = None

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, in_features] -> [T, sum(parts)]. `fwd` tells which adapters apply."""
        if self._fp8 is not None:
            return self._fp8.linear(x, self._fp8_weight(), self.bias)
        if self._packed is not None:
            return self._packed.linear(x, self.bias)
        return self.product.linear(x, self.weight, self.bias)

    def gated(self, x: Tensor, fwd: Forward) -> Tensor:
        """The same of silu(first half) * second half of x [T, 2 in_features]."""
        if self._fp8 is not None:
            return self._fp8.gated(x, self._fp8_weight(), self.bias)
        return self(self._activation.silu_mul(x), fwd)

    def fuses(self, num_rows: int, *, gated: bool) -> bool:
        """Whether `normed` is worth it for so many rows."""
        if self._fp8 is not None:
            return not gated and 1 <= num_rows <= self._fp8.fused_rows
        if self._packed is not None:
            return self._packed.fuses(gated=gated)
        return 1 <= num_rows <= self.product.fused_rows

    def normed(self, x: Tensor, residual: Tensor | None, norm: InputNorm, *, gated: bool) -> tuple[Tensor, Tensor]:
        """See `LinearProduct.normed`."""
        if self._fp8 is not None:
            assert not gated, "down takes gate and up"
            return self._fp8.normed(x, residual, norm, self._fp8_weight(), self.bias)
        if self._packed is not None:
            return self._packed.normed(x, residual, norm, self.bias, gated=gated)
        return self.product.normed(x, residual, norm, self.weight, self.bias, gated=gated)

    @property
    def plain_weight(self) -> Tensor | None:
        """The weight [N, K], if there is nothing to the product but it."""
        return self.weight if self.scales is None and self._packed is None and self.bias is None else None

    def refresh_derived(self) -> None:
        """Encode the weight as the machine computes with it, and free it. Does nothing if it is freed already."""
        if self._packing is not None and not self.weight.is_meta:
            self._packed = self._packing.pack(self.weight)
            self.weight = freed(self.weight)

    def keep_plain(self, dtype: torch.dtype) -> None:
        """Put an empty weight of `dtype` in the place of one in blocks."""
        self.weight, self.scales, self._fp8 = plain_weight(self.weight, dtype), None, None

    def _fp8_weight(self) -> Fp8Weight:
        assert self.scales is not None
        return Fp8Weight(values=self.weight, scales=self.scales, power_of_two=self._power_of_two)


class Embedding(nn.Module):
    """The table of token embeddings."""

    def __init__(self, vocab_size: int, hidden_size: int, context: BuildContext) -> None:
        super().__init__()
        self.weight = empty_parameter((vocab_size, hidden_size), context)

    def forward(self, ids: Tensor, fwd: Forward) -> Tensor:
        """[T] int64 -> [T, H]; the embeddings that the step brings, if it brings some."""
        return fwd.input_embeds if fwd.input_embeds is not None else F.embedding(ids, self.weight)


class Head(nn.Module):
    """Hidden rows to logits; `tied` shares the embedding's weight."""

    def __init__(self, vocab_size: int, hidden_size: int, context: BuildContext, tied: Embedding | None) -> None:
        super().__init__()
        self._tied = (tied,)  # in a tuple, so that the shared weight is not registered twice
        if tied is None:
            self.weight = empty_parameter((vocab_size, hidden_size), context)
        self.product = context.kernels.linear
        self._packing = context.packing
        self._packed: PackedWeight | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        if self._packed is not None:
            return self._packed.linear(hidden, None)
        (tied,) = self._tied
        return self.product.linear(hidden, self.weight if tied is None else tied.weight, None)

    @property
    def plain_weight(self) -> Tensor | None:
        """As `Linear.plain_weight`."""
        (tied,) = self._tied
        return None if self._packed is not None else self.weight if tied is None else tied.weight

    def refresh_derived(self) -> None:
        """As `Linear` does; a table of embeddings is kept beside its encoding."""
        if self._packing is not None and (weight := self.plain_weight) is not None and not weight.is_meta:
            self._packed = self._packing.pack(weight)
            if self._tied[0] is None:
                self.weight = freed(self.weight)
