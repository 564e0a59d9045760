"""Decodes GGUF's block formats to float32. Knows the bytes of a block, not files or tensor names.

A block holds 32 consecutive elements of a row: float16 numbers first, then packed integers.
Source of the layouts: ggml's block structs (ggml-common.h); the test compares with the `gguf` package bit by bit.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hornbeam.core.errors import ConfigError

_Q8_0_BYTES = 34


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


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": partial(_floats, dtype=torch.float32),
    "F16": partial(_floats, dtype=torch.float16),
    "BF16": partial(_floats, dtype=torch.bfloat16),
    "Q4_0": partial(_nibbles, minimum=False, fifth_bits=False),
    "Q4_1": partial(_nibbles, minimum=True, fifth_bits=False),
    "Q5_0": partial(_nibbles, minimum=False, fifth_bits=True),
    "Q5_1": partial(_nibbles, minimum=True, fifth_bits=True),
    "Q8_0": _q8_0,
}
