"""What a model computes with besides its parameters: made from them once they are loaded, and again after updates."""

from torch import nn

from hornbeam.layers.linear import Head, Linear
from hornbeam.layers.moe import WideGate


def refresh_derived(model: nn.Module) -> None:
    """Bring what `model` computes with up to date with its parameters, after they were loaded; safe to repeat."""
    for module in model.modules():
        if isinstance(module, Linear | Head | WideGate):
            module.refresh_derived()
