"""Makes the parameters of layers: plain ones, and weights that are eight-bit floats with scales of their blocks."""

import torch
from torch import nn

from hornbeam.core.errors import ConfigError
from hornbeam.layers.context import BuildContext
from hornbeam.ops.linear.contract import SCALE_BLOCK


def empty_parameter(shape: tuple[int, ...], context: BuildContext, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter without gradient, in the model's number format unless `dtype` says otherwise."""
    return nn.Parameter(torch.empty(shape, dtype=dtype or context.dtype, device=context.device), requires_grad=False)


def weight_parameters(
    stack: tuple[int, ...], parts: tuple[int, ...], in_features: int, context: BuildContext, *, quantized: bool = True
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The weight [*stack, sum(parts), in_features] of one or of stacked products, and the scales if it has blocks.

    Raises:
        ConfigError: a block would belong to two parts.
    """
    shape = (*stack, sum(parts), in_features)
    if context.fp8 is None or not quantized:
        return empty_parameter(shape, context), None
    if any(part % SCALE_BLOCK for part in parts[:-1]):
        raise ConfigError(
            f"weights with a scale per {SCALE_BLOCK} outputs cannot be fused from parts of "
            f"{', '.join(map(str, parts))} outputs, no multiples of {SCALE_BLOCK}: take the model in bfloat16"
        )
    scales = (*stack, sum(block_parts(parts)), -(-in_features // SCALE_BLOCK))
    return empty_parameter(shape, context, torch.float8_e4m3fn), empty_parameter(scales, context, torch.float32)


def plain_weight(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """An empty one of the same shape."""
    return nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False)


def block_parts(parts: tuple[int, ...]) -> tuple[int, ...]:
    """The rows of scales of each part of a weight."""
    return tuple(-(-part // SCALE_BLOCK) for part in parts)


def freed(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape without memory; to load it again, put an empty one in its place."""
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
