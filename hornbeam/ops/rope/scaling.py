"""How a model turns its heads: base, rotated features, angles stretched for long contexts; and how configs say so.

Without torch, so that a family's spec can hold these values.
"""

import math
from dataclasses import dataclass

from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError

_DEFAULT_THETA = 10000.0  # of configs that name none
_KINDS = "default, linear, dynamic, yarn, longrope, and those with a low_freq_factor"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """All angles are divided by `factor` (Chen et al., 2023)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WavelengthScaling:
    """Angles of wavelengths over original_context_len / low_freq_factor are divided by `factor`.

    Those under original_context_len / high_freq_factor are kept; in between the two blend.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): pairs that turn under `slow` times in the original context are divided by `factor`.

    Those that turn over `fast` times are kept, in between is a ramp over the pairs' numbers, whose ends are whole
    pairs if `truncate`. Cosines and sines are multiplied by `magnitude`.
    """

    factor: float
    original_context_len: int
    fast: float
    slow: float
    truncate: bool
    magnitude: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LongScaling:
    """LongRoPE (Ding et al., 2024): each pair's angle has a divisor, found by search; others in long contexts.

    The context that is served decides, not each sequence's length: what is cached must stay valid as it grows.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context_len: int
    magnitude: float


RopeScaling = LinearScaling | WavelengthScaling | YarnScaling | LongScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSettings:
    """`dim` features at the front of each head are rotated; pair i turns theta^(-2i / dim) radians per position."""

    dim: int
    theta: float
    scaling: RopeScaling | None = None


def parse_rope(config: ConfigReader, head_dim: int, context_len: int, *, partial: bool = False) -> RopeSettings:
    """A config's rotary settings: `rope_parameters` holds all since transformers 5, before they were several keys.

    partial: the model heeds `partial_rotary_factor`; most rotate whole heads whatever it says.

    Raises:
        ConfigError: something is missing, malformed or not implemented.
    """
    rope = config.section("rope_parameters", "rope_scaling")
    theta = rope.number("rope_theta", config.number("rope_theta", _DEFAULT_THETA))
    if theta <= 1:
        raise ConfigError(f"the config's rope_theta must be above 1, not {theta}")
    share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) if partial else 1.0
    dim = config.size("rotary_dim", int(head_dim * share))
    if dim > head_dim or dim % 2:
        raise ConfigError(f"rotary_dim = {dim} must be even and at most the head size {head_dim}")
    return RopeSettings(dim=dim, theta=theta, scaling=_parse_scaling(config, rope, dim, context_len))


def parse_ropes(
    config: ConfigReader, head_dim: int, context_len: int, *, theta: float, window_theta: float | None = None
) -> tuple[RopeSettings, RopeSettings]:
    """The rotary settings of layers that see everything, and of those with a window, where each kind has its own.

    Since transformers 5 each kind has a section in `rope_parameters`; before, scaling was of the former kind alone.

    Args:
        config: the model's.
        head_dim: features of a head.
        context_len: positions of the model.
        theta: of a config that names none.
        window_theta: likewise, of layers with a window; None: theirs is the others'.

    Raises:
        ConfigError: something is missing, malformed or not implemented.
    """
    each = config.section("rope_parameters")
    theta = config.number("rope_theta", theta)
    window_theta = config.number("rope_local_base_freq", window_theta or theta)
    full = {"rope_theta": theta, **config.section("rope_scaling").values, **each.section("full_attention").values}
    window = {"rope_theta": window_theta, **each.section("sliding_attention").values}
    full_rope, window_rope = (
        parse_rope(ConfigReader({"rope_parameters": values}), head_dim, context_len) for values in (full, window)
    )
    return full_rope, window_rope


def _parse_scaling(config: ConfigReader, rope: ConfigReader, dim: int, context_len: int) -> RopeScaling | None:
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    match kind:
        case "default" | "dynamic":  # dynamic stretches only sequences beyond the model's context, which are refused
            return None
        case "linear":
            return LinearScaling(factor=rope.number("factor"))
        case _ if "low_freq_factor" in rope.values:  # the usual name of this kind is a model's
            return WavelengthScaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_context_len=rope.size("original_max_position_embeddings"),
            )
        case "yarn":
            original = rope.size("original_max_position_embeddings", context_len)
            factor = rope.number("factor", context_len / original)
            return YarnScaling(
                factor=factor,
                original_context_len=original,
                fast=rope.number("beta_fast", 32.0),
                slow=rope.number("beta_slow", 1.0),
                truncate=rope.switch("truncate", True),
                magnitude=rope.number("attention_factor", _yarn_magnitude(rope, factor)),
            )
        case "longrope" | "su":
            given = rope.size("original_max_position_embeddings", context_len, least=2)
            original = config.size("original_max_position_embeddings", given, least=2)
            stretch = math.log(max(rope.number("factor", context_len / original), 1.0))
            return LongScaling(
                short=rope.numbers("short_factor", dim // 2),
                long=rope.numbers("long_factor", dim // 2),
                original_context_len=original,
                magnitude=rope.number("attention_factor", math.sqrt(1 + stretch / math.log(original))),
            )
    raise ConfigError(f"rotary scaling {kind!r} is not implemented (only {_KINDS})")


def _yarn_magnitude(rope: ConfigReader, factor: float) -> float:
    """0.1 ln(factor) + 1, or the quotient of two such terms if the config weighs them."""
    growth = 0.1 * math.log(max(factor, 1.0))
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        return (rope.number("mscale") * growth + 1) / (rope.number("mscale_all_dim") * growth + 1)
    return growth + 1
