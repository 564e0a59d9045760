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
from hornbeam.quant.contract import PackedWeight


class Linear(nn.Module):
    """y = x W^T + b, with one or several fused parts along the outputs.

    `parts` holds the rows of each part on this rank: checkpoint part i fills rows sum(parts[:i]) onward. `split` says
    which side is shared out over the tensor-parallel ranks, if one is; "in" needs a sum over ranks afterwards.
    """

    def __init__(
        self,
        in_features: int,
        parts: tuple[int, ...],
        context: BuildContext,
        *,
        bias: bool = False,
        split: Literal["out", "in", "none"],
    ) -> None:
        super().__init__()
        axis = context.grid.attn_tp
        if split == "in":
            in_features = axis.share(in_features, "input features")
        elif split == "out":
            parts = tuple(axis.share(part, "output features") for part in parts)
        self.parts = parts
        rows = sum(parts)
        self.weight = empty_parameter((rows, in_features), context)
        self.bias = empty_parameter((rows,), context) if bias else None
        self.product = context.kernels.linear
        self._packing = context.packing
        self._packed: PackedWeight | None = None

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, in_features] -> [T, sum(parts)]. `fwd` tells which adapters apply."""
        if self._packed is not None:
            return self._packed.linear(x, self.bias)
        return self.product.linear(x, self.weight, self.bias)

    def refresh_derived(self) -> None:
        """Encode the weight as the machine computes with it, and free it. Does nothing if it is freed already."""
        if self._packing is not None and not self.weight.is_meta:
            self._packed = self._packing.pack(self.weight)
            self.weight = freed(self.weight)


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
        self._product = context.kernels.linear
        self._packing = context.packing
        self._packed: PackedWeight | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        if self._packed is not None:
            return self._packed.linear(hidden, None)
        (tied,) = self._tied
        return self._product.linear(hidden, self.weight if tied is None else tied.weight, None)

    def refresh_derived(self) -> None:
        """As `Linear` does; a table of embeddings is kept beside its encoding."""
        if self._packing is None:
            return
        (tied,) = self._tied
        if tied is not None:
            self._packed = self._packing.pack(tied.weight, precise=True)
        elif not self.weight.is_meta:
            self._packed = self._packing.pack(self.weight, precise=True)
            self.weight = freed(self.weight)


def refresh_derived(model: nn.Module) -> None:
    """Bring what `model` computes with up to date with its parameters, after they were loaded; safe to repeat."""
    for module in model.modules():
        if isinstance(module, Linear | Head):
            module.refresh_derived()


def freed(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape without memory; to load it again, put an empty one in its place."""
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def empty_parameter(shape: tuple[int, ...], context: BuildContext, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter without gradient, in the model's number format unless `dtype` says otherwise."""
    return nn.Parameter(torch.empty(shape, dtype=dtype or context.dtype, device=context.device), requires_grad=False)
