"""Sliding windows of a model's layers: how configs say which layers have one, and the cache groups that follow.

A layer's window is the number of tokens that a query sees, its own included; None: all before it.
"""

from collections.abc import Sequence

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError

_SLIDING = {"sliding_attention": True, "full_attention": False}


def parse_windows(read: ConfigReader, slides: Sequence[bool], context_len: int) -> tuple[int | None, ...]:
    """The window of each layer: `sliding_window` in the layers that `layer_types` names, without it in `slides`.

    Raises:
        ConfigError: the settings are malformed, or name kinds of layers other than sliding and full attention.
    """
    if read.values.get("sliding_window") is None:
        return (None,) * len(slides)
    window = read.size("sliding_window")
    if window >= context_len:  # then it hides nothing
        return (None,) * len(slides)
    kinds = read.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != len(slides) or not all(kind in _SLIDING for kind in kinds):
            raise ConfigError(f"the config's layer_types must be {len(slides)} of {', '.join(_SLIDING)}, not {kinds!r}")
        slides = [_SLIDING[kind] for kind in kinds]
    return tuple(window if slide else None for slide in slides)


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
