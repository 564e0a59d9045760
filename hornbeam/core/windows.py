"""Sliding windows of a model's layers: how configs say which layers have one, and the cache groups that follow.

A layer's window is the number of tokens that a query sees, its own included; None: all before it.
"""

from collections.abc import Sequence

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError

_SLIDING = {"sliding_attention": True, "full_attention": False}


def parse_slides(read: ConfigReader, slides: Sequence[bool]) -> tuple[bool, ...]:
    """Whether each layer is of the kind that has a window: by `layer_types`, without it as in `slides`.

    Raises:
        ConfigError: kinds of layers other than sliding and full attention, or not as many as layers.
    """
    kinds = read.values.get("layer_types")
    if kinds is None:
        return tuple(slides)
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(slides)
        or not all(isinstance(kind, str) and kind in _SLIDING for kind in kinds)
    ):
        raise ConfigError(f"the config's layer_types must be {len(slides)} of {', '.join(_SLIDING)}, not {kinds!r}")
    return tuple(_SLIDING[kind] for kind in kinds)


def parse_windows(read: ConfigReader, slides: Sequence[bool], context_len: int) -> tuple[int | None, ...]:
    """The window of each layer: `sliding_window` in those that `parse_slides` finds, if it hides anything.

    Raises:
        ConfigError: the settings are malformed.
    """
    if read.values.get("sliding_window") is None:
        return (None,) * len(slides)
    window = read.size("sliding_window")
    if window >= context_len:
        return (None,) * len(slides)
    return tuple(window if slide else None for slide in parse_slides(read, slides))


def attention_specs(
    windows: Sequence[int | None], num_kv_heads: int, head_dim: int, dtype: str
) -> tuple[CacheSpec, ...]:
    """A cache group of the layers that keep everything, then one for each window that some layers have."""
    row = (num_kv_heads, head_dim)
    return tuple(
        CacheSpec(
            kind="full" if window is None else "window",
            layers=tuple(layer for layer, other in enumerate(windows) if other == window),
            row_shapes=(row, row),
            dtype=dtype,
            window=window,
        )
        for window in sorted(set(windows), key=lambda window: window or 0)
    )
