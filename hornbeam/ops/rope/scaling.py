"""How a model stretches its rotary angles, as a value. Without torch, so that a family's spec can hold one."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How a model stretches its trained context, as its configuration names it."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  # llama3 only, like the two below
    high_freq_factor: float = 4.0
    original_context_len: int = 8192
