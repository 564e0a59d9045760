"""A model through torch.compile, which makes kernels of its own for what lies between attention, experts and products.

Where the compiler looks, norms and activations are plain torch (see `ops/kernels.py`); what it could not see through
stays as it is.
"""

from typing import cast

import torch
from torch import nn

from hornbeam.layers.attention import Attention
from hornbeam.layers.forward import Model
from hornbeam.layers.mla import LatentAttention
from hornbeam.layers.moe import MoE


def compiled(model: Model) -> Model:
    """The same model, compiled at its first calls: in all for one row, for one other number, and for any number."""
    assert isinstance(model, nn.Module)
    for module in model.modules():
        if isinstance(module, Attention):
            _hide(module, "attend")
        elif isinstance(module, LatentAttention | MoE):
            _hide(module, "forward")
    return cast(Model, torch.compile(model))


def _hide(module: nn.Module, method: str) -> None:
    """From the compiler."""
    setattr(module, method, torch.compiler.disable(getattr(module, method)))
