"""How a model stretches its rotary angles, as a value. Without torch, so that a family's spec can hold one."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How a model stretches its trained context: all angles, or only those of long wavelengths."""

    kind: Literal["linear", "wavelength"]
    factor: float
    low_freq_factor: float = 1.0  # wavelength only, like the two below
    high_freq_factor: float = 4.0
    original_context_len: int = 8192
