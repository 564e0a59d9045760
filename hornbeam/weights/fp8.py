"""Weights that are eight-bit floats in blocks, in the checkpoint or in the model: their scales, and what becomes them.

A checkpoint has them for products, as X.weight and X.weight_scale_inv. A model keeps them so, but for modules that the
checkpoint lists as not quantized in part, and for weights that it computes with in other ways: those are widened.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from hornbeam.core.errors import ConfigError
from hornbeam.core.family import Placement
from hornbeam.core.fp8 import Fp8Format
from hornbeam.layers.linear import Linear
from hornbeam.layers.mla import UpProjection
from hornbeam.layers.moe import StackedLinear
from hornbeam.ops.linear.contract import SCALE_BLOCK
from hornbeam.ops.linear.fp8_reference import LARGEST, round_weight, widened

SCALES = "_scale_inv"  # behind the name of a weight
_DRAWN_DEVIATION = 100.0  # of random values: few of them would be larger than the largest number


class _Source(Protocol):
    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """See `weights.checkpoint.TensorSource`."""


def keep_listed_plain(
    model: nn.Module, weight_map: Mapping[str, Placement], fp8: Fp8Format, dtype: torch.dtype
) -> None:
    """Give products that the checkpoint lists as not quantized, in part or whole, empty weights of `dtype`."""
    for name, place in weight_map.items():
        owner = _owner(model, place)
        if isinstance(owner, Linear | StackedLinear) and owner.scales is not None and fp8.leaves_plain(_module(name)):
            owner.keep_plain(dtype)


def in_blocks(model: nn.Module, weight_map: Mapping[str, Placement], fp8: Fp8Format) -> set[str]:
    """The names of weights that a checkpoint of this format has in blocks.

    Raises:
        ConfigError: the rows of one must be reordered.
    """
    names = {
        name
        for name, place in weight_map.items()
        if name.endswith(".weight") and _is_product(_owner(model, place)) and not fp8.leaves_plain(_module(name))
    }
    for name in names:
        if keeps_blocks(model, weight_map[name]) and weight_map[name].transform != "none":
            raise ConfigError(f"{name} has blocks of rows, which must be reordered: take the model in bfloat16")
    return names


def keeps_blocks(model: nn.Module, place: Placement) -> bool:
    """Whether the model has the weight in blocks."""
    return model.get_parameter(place.parameter).dtype == torch.float8_e4m3fn


def scales_place(place: Placement) -> Placement:
    """Of the scales of the weight whose place is given."""
    return replace(place, parameter=place.parameter.removesuffix("weight") + "scales")


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a weight [..., N, K]."""
    return (*shape[:-2], *(-(-size // SCALE_BLOCK) for size in shape[-2:]))


def read_widened(source: _Source, names: Collection[str], widen: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, those to `widen` multiplied with their scales, as float32."""
    waiting: dict[str, Tensor] = {}  # the half that came first
    for name, tensor in source.read({*names, *(name + SCALES for name in widen)}):
        whole = name.removesuffix(SCALES)
        if whole not in widen:
            yield name, tensor
        elif whole not in waiting:
            waiting[whole] = tensor
        else:
            first = waiting.pop(whole)
            values, scales = (first, tensor) if name.endswith(SCALES) else (tensor, first)
            yield whole, widened(values, scales.float())


def fill_rounded(values: Tensor, scales: Tensor, weight: Tensor, *, power_of_two: bool) -> None:
    """Round a plain weight [..., N, K], one matrix after the other."""
    if weight.dim() > 2:
        for parts in zip(values, scales, weight, strict=True):
            fill_rounded(*parts, power_of_two=power_of_two)
    else:
        rounded, their_scales = round_weight(weight.to(values.device), power_of_two=power_of_two)
        values.copy_(rounded)
        scales.copy_(their_scales)


def draw_values(values: Tensor, generator: torch.Generator) -> None:
    """Fill [..., N, K] float8_e4m3fn with random numbers that, times `drawn_scale`, have the wanted deviation."""
    for matrix in values if values.dim() > 2 else (values,):
        drawn = torch.empty(matrix.shape, device=matrix.device).normal_(0, _DRAWN_DEVIATION, generator=generator)
        matrix.copy_(drawn.clamp_(-LARGEST, LARGEST))


def drawn_scale(deviation: float) -> float:
    """The scale of blocks whose values `draw_values` has drawn."""
    return deviation / _DRAWN_DEVIATION


def _owner(model: nn.Module, place: Placement) -> nn.Module:
    return model.get_submodule(place.parameter.rpartition(".")[0])


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _is_product(owner: nn.Module) -> bool:
    return owner.quantized if isinstance(owner, Linear) else isinstance(owner, StackedLinear | UpProjection)
