"""A model through torch.compile, which makes kernels of its own for what lies between attention, experts and products.

Where the compiler looks, norms and activations are plain torch (see `ops/kernels.py`). Products stay ours, with the
norms and gates that they do themselves: torch's take longer for few rows. What it could not see through stays, too.
"""

from typing import cast

import torch
from torch import nn

from hornbeam.layers.attention import Attention
from hornbeam.layers.forward import Model
from hornbeam.layers.linear import Linear
from hornbeam.layers.mla import LatentAttention
from hornbeam.layers.moe import MoE

_MOST_VARIANTS = 64  # of a function: numbers of rows, and the first block apart from the others


def compiled(model: Model) -> Model:
    """The same model, compiled at its first calls: for one row, for any number, and what the compiler tells apart.

    Sets for the whole process how often one function may be compiled.
    """
    assert isinstance(model, nn.Module)
    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    for module in model.modules():
        if isinstance(module, Attention):
            _hide(module, "attend")
        elif isinstance(module, LatentAttention | MoE):
            _hide(module, "forward")
        elif isinstance(module, Linear):
            for method in ("forward", "gated", "added", "gate", "normed"):
                _hide(module, method)
    return cast(Model, torch.compile(model))


def _hide(module: nn.Module, method: str) -> None:
    """From the compiler."""
    setattr(module, method, torch.compiler.disable(getattr(module, method)))
