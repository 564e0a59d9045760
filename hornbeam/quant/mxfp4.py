"""Decodes MXFP4 (OCP Microscaling Formats, 2023): blocks of 32 four-bit floats that share an exponent of eight bits.

Knows the numbers, not files or tensor names. Every value is a bfloat16 number, so decoding is exact.
"""

import torch
from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))  # by nibble: the highest bit is the sign
BIAS = 127  # of the exponents


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks [E, N, G, 16] of two elements a byte, low half first, and exponents [E, N, G] -> [E, N, 32 G] bfloat16.

    Both uint8. One expert at a time is decoded, so that little memory is needed besides the result's.
    """
    num_experts, num_rows, num_groups, _ = blocks.shape
    values = torch.tensor(VALUES)
    out = torch.empty((num_experts, num_rows, num_groups * 32), dtype=torch.bfloat16)
    for expert in range(num_experts):
        packed = blocks[expert]
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        exponents = scales[expert].int() - BIAS
        out[expert] = torch.ldexp(values[nibbles.int()], exponents[:, :, None]).flatten(1)
    return out
