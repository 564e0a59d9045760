"""Tables of strings: a name, where its implementation stands ("module:attr"), and a predicate on a query.

An entry's module is imported only when the entry is chosen or asked; one that raises is skipped with its reason
and touches nothing else. Entry points of group `hornbeam.<registry name>` add rows from other packages.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from hornbeam.core.errors import ConfigError

T = TypeVar("T")
Query = TypeVar("Query")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Generic[T]):
    """The entry that was picked, and why the ones before it were not."""

    name: str
    value: T
    skipped: tuple[tuple[str, str], ...] = ()  # (entry, reason), in order of preference

    @property
    def reason(self) -> str:
        """One line for the log."""
        return "; ".join(f"{name} skipped: {why}" for name, why in self.skipped) or "first choice"


@dataclass(slots=True)
class Registry(Generic[Query, T]):
    """Named implementations in order of preference.

    The attribute an entry points to must offer `supports(query) -> str | None`: None if it can serve the query,
    else the reason why not.
    """

    name: str
    entries: dict[str, str] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """All entries, other packages' included, in order of preference."""
        return tuple(self._all())

    def load(self, name: str) -> T:
        """Import entry `name`. Raises ConfigError if there is none, else whatever its import raises."""
        entries = self._all()
        if name not in entries:
            raise ConfigError(f"no {self.name} named {name!r}; there are: {', '.join(entries)}")
        module, _, attribute = entries[name].partition(":")
        value: T = getattr(importlib.import_module(module), attribute)
        return value

    def choose(self, query: Query, wanted: str = "auto", probe: Callable[[T], None] | None = None) -> Choice[T]:
        """Pick an entry: `wanted` if it supports the query, else ("auto") the first that does.

        Args:
            query: what it must serve.
            wanted: a name, or "auto".
            probe: uses an entry in earnest, in the smallest way, and raises if it does not keep its word.

        Raises:
            ConfigError: the wanted entry cannot serve, or none can; the message holds every reason.
        """
        skipped: list[tuple[str, str]] = []
        for name in self._all() if wanted == "auto" else (wanted,):
            reason, value = self._try(name, query, probe)
            if value is not None:
                return Choice(name=name, value=value, skipped=tuple(skipped))
            skipped.append((name, reason))
        raise ConfigError(f"no {self.name} can serve: " + "; ".join(f"{name}: {why}" for name, why in skipped))

    def _try(self, name: str, query: Query, probe: Callable[[T], None] | None) -> tuple[str, T | None]:
        try:
            value: Any = self.load(name)
            reason: str | None = value.supports(query)
            if reason is None and probe is not None:
                probe(value)
        except Exception as error:  # a broken backend must not take the others with it
            return f"{type(error).__name__}: {error}", None
        return (reason, None) if reason is not None else ("", value)

    def _all(self) -> dict[str, str]:
        found = {point.name: point.value for point in importlib.metadata.entry_points(group=f"hornbeam.{self.name}")}
        return {**self.entries, **found}
