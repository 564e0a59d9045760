"""Linear maps, the only layers with large weights: dense products, the embedding table and the head."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward


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

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, in_features] -> [T, sum(parts)]. `fwd` tells which adapters apply."""
        return self.product.linear(x, self.weight, self.bias)


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

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
        (tied,) = self._tied
        return self._product.linear(hidden, self.weight if tied is None else tied.weight, None)


def empty_parameter(shape: tuple[int, ...], context: BuildContext, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter without gradient, in the model's number format unless `dtype` says otherwise."""
    return nn.Parameter(torch.empty(shape, dtype=dtype or context.dtype, device=context.device), requires_grad=False)
