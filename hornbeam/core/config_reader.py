"""Typed access to a Hugging Face config: what a family's `parse` reads sizes, numbers and switches with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hornbeam.core.errors import ConfigError

MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000  # a config that says more is damaged
MAX_POSITIONS = 2**24  # float32 has no more whole numbers
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """A JSON object of settings; null counts as absent. All methods raise ConfigError, naming the setting."""

    values: Mapping[str, Any]

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """An integer of at least `least`; more than `most` can only be damage."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise ConfigError(f"the config's {name} must be {kind} (and at most {most}), not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ConfigError(f"the config's {name} must be a positive number, not {value!r}")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers."""
        value = self._value(name, None)
        if not isinstance(value, list) or len(value) != count or not all(isinstance(x, (int, float)) for x in value):
            raise ConfigError(f"the config's {name} must be a list of {count} numbers")
        return tuple(float(x) for x in value)

    def switch(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"the config's {name} must be true or false, not {value!r}")
        return value

    def section(self, *names: str) -> "ConfigReader":
        """The object under the first of `names` that is there; an empty one if none is."""
        value: Any = next((self.values[name] for name in names if self.values.get(name)), {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"the config's {' or '.join(names)} must be an object, not {value!r}")
        return ConfigReader(value)

    def only(self, name: str, supported: Any) -> None:
        """Refuse a setting that would change the mathematics."""
        value = self.values.get(name)
        if value not in (None, supported):
            raise ConfigError(f"this family does not implement {name} = {value!r} (only {supported!r})")

    def dtype(self) -> str:
        """Of the checkpoint's numbers."""
        dtype = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise ConfigError(f"the config's dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
        return name

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise ConfigError(f"the model's config lacks {name}")
        return default if value is None else value
