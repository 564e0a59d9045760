"""The unit of an expert, for the kernels that end in it."""

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """See `GatedUnit`; gate and up are float32, rounded to `dtype` first, as the reference does."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    return (up + OFFSET) * gate / (1.0 + tl.exp(-ALPHA * gate))
