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
from hornbeam.ops.linear.contract import Fp8Weight, InputNorm
from hornbeam.ops.linear.encoding import Blocked, Encoding, Packed, Plain


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
        self._context = context
        self._encoding = self._loaded_encoding()

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, in_features] -> [T, sum(parts)]. `fwd` tells which adapters apply."""
        return self._encoding.linear(x)

    def gated(self, x: Tensor, fwd: Forward) -> Tensor:
        """The same of silu(first half) * second half of x [T, 2 in_features]."""
        return self._encoding.gated(x)

    def added(
        self, x: Tensor, residual: Tensor, fwd: Forward, *, gated: bool = False, factor: float = 1
    ) -> tuple[Tensor, Tensor | None]:
        """factor * `forward` of x, or of `gated`, and the residual [T, N] to add to it; see `LinearProduct.added`."""
        if isinstance(self._encoding, Plain) and factor == 1 and fwd.adapters is None:
            return self._encoding.added(x, residual, gated=gated)
        out = self.gated(x, fwd) if gated else self(x, fwd)
        return out if factor == 1 else out * factor, residual

    def fuses(self, num_rows: int, *, gated: bool) -> bool:
        """See `Encoding`."""
        return self._encoding.fuses(num_rows, gated=gated)

    def gate(self, x: Tensor, fwd: Forward) -> Tensor | None:
        """silu(first half) * second half of the outputs, [T, N / 2], where that is one kernel; None elsewhere."""
        return self._encoding.gate(x) if isinstance(self._encoding, Plain) and fwd.adapters is None else None

    def normed(self, x: Tensor, residual: Tensor | None, norm: InputNorm, *, gated: bool) -> tuple[Tensor, Tensor]:
        """See `LinearProduct.normed`."""
        return self._encoding.normed(x, residual, norm, gated=gated)

    @property
    def plain_weight(self) -> Tensor | None:
        """The weight [N, K], if there is nothing to the product but it."""
        return self.weight if isinstance(self._encoding, Plain) and self.bias is None else None

    def refresh_derived(self) -> None:
        """Encode the weight as the machine computes with it, and free it. Does nothing if it is freed already."""
        if self._context.packing is not None and not self.weight.is_meta:
            self._encoding = _packed(self.weight, self.bias, self._context)
            self.weight = freed(self.weight)

    def keep_plain(self, dtype: torch.dtype) -> None:
        """Put an empty weight of `dtype` in the place of one in blocks."""
        self.weight, self.scales = plain_weight(self.weight, dtype), None
        self._encoding = self._loaded_encoding()

    def _loaded_encoding(self) -> Encoding:
        """Of the parameters themselves, which may still be empty."""
        kernels, fp8 = self._context.kernels, self._context.fp8
        if self.scales is None:
            return Plain(weight=self.weight, bias=self.bias, product=kernels.linear, activation=kernels.activation)
        assert fp8 is not None
        assert kernels.fp8_linear is not None
        blocks = Fp8Weight(values=self.weight, scales=self.scales, power_of_two=fp8.power_of_two)
        return Blocked(weight=blocks, bias=self.bias, product=kernels.fp8_linear)


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
        if tied is None:
            self.weight = empty_parameter((vocab_size, hidden_size), context)
        self._owner = (tied or self,)  # in a tuple, so that the shared weight is not registered twice
        weight = self._owner[0].weight
        self.product, activation = context.kernels.linear, context.kernels.activation
        self._encoding: Encoding = Plain(weight=weight, bias=None, product=self.product, activation=activation)
        self._context = context

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        return self._encoding.linear(hidden)

    @property
    def plain_weight(self) -> Tensor | None:
        """As `Linear.plain_weight`."""
        return self._encoding.weight if isinstance(self._encoding, Plain) else None

    def refresh_derived(self) -> None:
        """As `Linear` does; a table of embeddings is kept beside its encoding."""
        (owner,) = self._owner
        if self._context.packing is not None and not owner.weight.is_meta:
            self._encoding = _packed(owner.weight, None, self._context)
            if owner is self:
                self.weight = freed(self.weight)


def _packed(weight: Tensor, bias: Tensor | None, context: BuildContext) -> Encoding:
    assert context.packing is not None
    return Packed(weight=context.packing.pack(weight), bias=bias, activation=context.kernels.activation)
