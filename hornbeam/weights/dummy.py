"""Fills a built model's parameters, in place, with random numbers: for measurements without a checkpoint."""

import hashlib

import torch
from torch import nn

from hornbeam.layers.linear import Embedding, Head
from hornbeam.weights.fp8 import draw_values, drawn_scale

_DEVIATION = 0.02
_TABLE_DEVIATION = 1.0  # of embeddings that are not the head, too
_ONTO_RESIDUAL = ("output", "down")  # layers whose outputs are added up over the depth of a model
_RESIDUAL_DEVIATION = 0.002
_ZEROS = ("bias", "correction")  # trained corrections level how often experts are chosen, which here is level anyway


@torch.no_grad()
def draw_dummy(model: nn.Module, seed: int) -> None:
    """Fill `model` with numbers that make routing and arithmetic look real: normal(0, 0.02), norms 1, biases 0.

    What is added to the residual has a tenth of that, a table of embeddings that is not the head, too, is normal(0, 1),
    and corrections of routing are 0: then experts are chosen evenly, whatever prefixes requests share. What is float32
    is drawn as bfloat16.
    A parameter's numbers depend on `seed`, its name, its shape and its kind of device, not on other parameters.
    """
    heads = {id(module.plain_weight) for module in model.modules() if isinstance(module, Head)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)} - heads
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        small = owner.rpartition(".")[2] in _ONTO_RESIDUAL
        deviation = _TABLE_DEVIATION if id(parameter) in tables else _RESIDUAL_DEVIATION if small else _DEVIATION
        if kind == "weight" and parameter.dim() == 1:  # of a norm
            parameter.fill_(1)
        elif kind in _ZEROS:
            parameter.zero_()
        elif kind == "scales":
            parameter.fill_(drawn_scale(deviation))
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7]))
            if parameter.dtype == torch.float8_e4m3fn:
                draw_values(parameter, generator)
                continue
            parameter.normal_(0, deviation, generator=generator)
            if parameter.dtype == torch.float32:
                parameter.copy_(parameter.bfloat16())  # nearly all checkpoints have them so
