"""Decodes GGUF's block formats to float32. Knows the bytes of a block, not files or tensor names.

A block holds 32 consecutive elements of a row: float16 numbers first, then packed integers. A block of the K formats
holds 256, in 8 or 16 groups with integer scales (and minima) of their own, which the block's float16 numbers scale.
Source of the layouts: ggml's block structs (ggml-common.h); the test compares with the `gguf` package bit by bit.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hornbeam.core.errors import ConfigError
from hornbeam.quant import mxfp4

_Q8_0_BYTES = 34
_IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(data: npt.NDArray[np.uint8], type_name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of row-major `shape` that `data` encodes as ggml type `type_name`: a new float32 tensor on the CPU.

    Raises:
        ConfigError: the type is not supported.
    """
    decode = _DECODERS.get(type_name)
    if decode is None:
        raise ConfigError(
            f"tensors of GGUF type {type_name} are not supported; take a file with {', '.join(_DECODERS)} only"
        )
    return decode(torch.from_numpy(data.copy())).view(shape)  # a copy: torch has no read-only tensors


def join_heads(keys: Tensor, values: Tensor) -> Tensor:
    """The projection of R features to a key and a value for each head: [H, R, K], [H, V, R] -> [H (K + V), R]."""
    return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)


def _floats(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return raw.view(dtype).float()


def _q8_0(raw: Tensor) -> Tensor:
    """Scale, 32 signed bytes."""
    blocks = raw.view(-1, _Q8_0_BYTES)
    return blocks[:, 2:].view(torch.int8).float().mul_(_floats(blocks[:, :2], torch.float16))


def _nibbles(raw: Tensor, *, minimum: bool, fifth_bits: bool) -> Tensor:
    """Scale, [minimum], [4 bytes with the fifth bit of each element], 16 bytes with two elements' low four bits.

    Low halves of the 16 bytes are elements 0..15, high halves 16..31. Without a minimum the integers are centred.
    """
    integers_at = 4 if minimum else 2
    packed_at = integers_at + (4 if fifth_bits else 0)
    blocks = raw.view(-1, packed_at + 16)
    packed = blocks[:, packed_at:]
    integers = torch.cat((packed & 15, packed >> 4), dim=1)
    if fifth_bits:
        bits = blocks[:, integers_at:packed_at, None] >> torch.arange(8, dtype=torch.uint8)
        integers |= (bits & 1).flatten(1) << 4
    scales = _floats(blocks[:, :integers_at], torch.float16)
    if minimum:
        return integers.float().mul_(scales[:, :1]).add_(scales[:, 1:])
    return integers.float().sub_(16 if fifth_bits else 8).mul_(scales)


def _iq4_nl(raw: Tensor) -> Tensor:
    """Scale, 16 bytes with two elements' four-bit places in the table of values."""
    blocks = raw.view(-1, 18)
    values = torch.tensor(_IQ4_NL_VALUES, dtype=torch.float32)[_fields(blocks[:, 2:], 16, 4).int()]
    return values.mul_(_floats(blocks[:, :2], torch.float16))


def _mxfp4(raw: Tensor) -> Tensor:
    """Exponent, 16 bytes with two elements' four-bit floats."""
    blocks = raw.view(-1, 17)
    values = torch.tensor(mxfp4.VALUES)[_fields(blocks[:, 1:], 16, 4).int()]
    return torch.ldexp(values, blocks[:, :1].int() - mxfp4.BIAS)


def _fields(packed: Tensor, run: int, bits: int) -> Tensor:
    """Unpack uint8 [N, B] to [N, B * 8 / bits]: of each run of bytes first all lowest `bits`, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run)
    return torch.bitwise_and(runs >> shifts, 2**bits - 1).flatten(1)


def _q2_k(raw: Tensor) -> Tensor:
    """16 bytes with scale and minimum of each group, 64 bytes of two-bit integers, both float16 numbers."""
    blocks = raw.view(-1, 84)
    scale, minimum = _floats(blocks[:, 80:], torch.float16).split(1, 1)
    scales, minima = scale * (blocks[:, :16] & 15), minimum * (blocks[:, :16] >> 4)
    return _scaled(_fields(blocks[:, 16:80], 32, 2), scales).sub_(minima[:, :, None])


def _q3_k(raw: Tensor) -> Tensor:
    """32 bytes of (inverted) third bits, 64 of two-bit integers, 12 with six-bit scales, the float16 number."""
    blocks = raw.view(-1, 110)
    scales = _fields(blocks[:, 96:104], 8, 4) | (_fields(blocks[:, 104:108], 4, 2) << 4)
    scales = _floats(blocks[:, 108:], torch.float16) * (scales.float() - 32)
    integers = _fields(blocks[:, 32:96], 32, 2) | (_fields(blocks[:, :32], 32, 1) << 2)
    return _scaled(integers.float().sub_(4), scales)


def _q4_k(raw: Tensor) -> Tensor:
    """Both float16 numbers, 12 bytes with six-bit scales and minima, 128 bytes of four-bit integers."""
    blocks = raw.view(-1, 144)
    scales, minima = _scales_and_minima(blocks)
    return _scaled(_fields(blocks[:, 16:], 32, 4), scales).sub_(minima[:, :, None])


def _q5_k(raw: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the integers."""
    blocks = raw.view(-1, 176)
    scales, minima = _scales_and_minima(blocks)
    integers = _fields(blocks[:, 48:], 32, 4) | (_fields(blocks[:, 16:48], 32, 1) << 4)
    return _scaled(integers, scales).sub_(minima[:, :, None])


def _q6_k(raw: Tensor) -> Tensor:
    """128 bytes of low four bits, 64 of high two bits, 16 signed scales, the float16 number."""
    blocks = raw.view(-1, 210)
    scales = _floats(blocks[:, 208:], torch.float16) * blocks[:, 192:208].view(torch.int8)
    integers = _fields(blocks[:, :128], 64, 4) | (_fields(blocks[:, 128:192], 32, 2) << 4)
    return _scaled(integers.float().sub_(32), scales)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of the 8 groups of Q4_K and Q5_K, [N, 8] each: six bits, of the last four groups' the high two are elsewhere."""
    scale, minimum = _floats(blocks[:, :4], torch.float16).split(1, 1)
    first, second, rest = blocks[:, 4:16].split(4, 1)
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), 1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), 1)
    return scale * scales, minimum * minima


def _scaled(integers: Tensor, scales: Tensor) -> Tensor:
    """[N, 256] integers times [N, G] scales of their groups -> [N, G, 256 / G] float32."""
    return integers.view(*scales.shape, -1) * scales[:, :, None]


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": partial(_floats, dtype=torch.float32),
    "F16": partial(_floats, dtype=torch.float16),
    "BF16": partial(_floats, dtype=torch.bfloat16),
    "Q4_0": partial(_nibbles, minimum=False, fifth_bits=False),
    "Q4_1": partial(_nibbles, minimum=True, fifth_bits=False),
    "Q5_0": partial(_nibbles, minimum=False, fifth_bits=True),
    "Q5_1": partial(_nibbles, minimum=True, fifth_bits=True),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
}
