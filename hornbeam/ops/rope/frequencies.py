"""The angles of rotary embeddings: inverse frequencies, scaled for long contexts, and the table per position."""

import math

import torch
from torch import Tensor

from hornbeam.ops.rope.scaling import LinearScaling, LongScaling, RopeScaling, WavelengthScaling, YarnScaling


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None, num_positions: int) -> Tensor:
    """[dim / 2] float32: radians per position of each pair of features, for contexts of `num_positions`."""
    base = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    match scaling:
        case None:
            return base
        case LinearScaling():
            return base / scaling.factor
        case WavelengthScaling():
            kept = _kept_by_wavelength(base, scaling)
        case YarnScaling():
            kept = _kept_by_turns(dim, theta, scaling)
        case LongScaling():
            divisors = scaling.long if num_positions > scaling.original_context_len else scaling.short
            return base / torch.tensor(divisors)
    return (1 - kept) * base / scaling.factor + kept * base


def rope_table(dim: int, theta: float, scaling: RopeScaling | None, num_positions: int) -> Tensor:
    """[num_positions, dim] float32 on the CPU: the cosines of all pairs, then their sines."""
    frequencies = inverse_frequencies(dim, theta, scaling, num_positions)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    magnitude = scaling.magnitude if isinstance(scaling, YarnScaling | LongScaling) else 1.0
    return torch.cat((angles.cos(), angles.sin()), -1) * magnitude


def _kept_by_wavelength(base: Tensor, scaling: WavelengthScaling) -> Tensor:
    """[dim / 2] in 0..1: how much of each frequency stays as it was."""
    turns = scaling.original_context_len * base / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return share.clamp(0, 1)


def _kept_by_turns(dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    """[dim / 2] in 0..1: a ramp from the pair that turns `fast` times in the original context to the `slow` one."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_context_len / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.fast), pair_that_turns(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    return 1 - ((torch.arange(dim // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
