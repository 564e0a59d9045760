"""The angles of rotary embeddings: inverse frequencies, scaled for long contexts, and the table per position."""

import math

import torch
from torch import Tensor

from hornbeam.ops.rope.scaling import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[head_dim / 2] float32: radians per position of each pair of dimensions.

    linear divides all by `factor` (Chen et al., 2023); wavelength divides only those longer than the original
    context / low_freq_factor, keeps those shorter than / high_freq_factor, and blends in between.
    """
    base = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return base
    if scaling.kind == "linear":
        return base / scaling.factor
    wavelengths = 2 * math.pi / base
    blend = (scaling.original_context_len / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0, 1)
    return (1 - blend) * base / scaling.factor + blend * base


def rope_table(head_dim: int, theta: float, scaling: RopeScaling | None, num_positions: int) -> Tensor:
    """[num_positions, head_dim] float32 on the CPU: the cosines of all pairs, then their sines."""
    angles = torch.outer(torch.arange(num_positions).float(), inverse_frequencies(head_dim, theta, scaling))
    return torch.cat((angles.cos(), angles.sin()), -1)
