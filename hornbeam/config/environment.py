"""The environment, read in one place. No other module looks at `os.environ` for a setting of Hornbeam."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hornbeam.core.errors import ConfigError

VARIABLES = (
    "HORNBEAM_CACHE_DIR",
    "HORNBEAM_DISABLED_MODEL_ARCHS",
    "HORNBEAM_REQ_RUNNING_TIMEOUT",
    "HORNBEAM_REQ_WAITING_TIMEOUT",
    "HORNBEAM_STRICT_CHECKS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment says."""

    cache_dir: Path  # for downloads
    disabled_architectures: frozenset[str]  # never imported
    waiting_timeout: float | None  # seconds that a request may wait, None: as long as it takes
    running_timeout: float | None
    strict_checks: bool  # an error in the cache's books ends the engine, rather than being logged


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """HORNBEAM_CACHE_DIR (default: hornbeam/ in XDG_CACHE_HOME or ~/.cache) and HORNBEAM_DISABLED_MODEL_ARCHS.

    HORNBEAM_REQ_WAITING_TIMEOUT and HORNBEAM_REQ_RUNNING_TIMEOUT are seconds; -1, the default, sets no limit.
    HORNBEAM_STRICT_CHECKS=1 is for tests.

    Raises:
        ConfigError: a time-out that is no number of seconds.
    """
    base = variables.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    disabled = variables.get("HORNBEAM_DISABLED_MODEL_ARCHS", "")
    return Environment(
        cache_dir=Path(variables.get("HORNBEAM_CACHE_DIR") or Path(base) / "hornbeam"),
        disabled_architectures=frozenset(name.strip() for name in disabled.split(",") if name.strip()),
        waiting_timeout=_seconds(variables, "HORNBEAM_REQ_WAITING_TIMEOUT"),
        running_timeout=_seconds(variables, "HORNBEAM_REQ_RUNNING_TIMEOUT"),
        strict_checks=variables.get("HORNBEAM_STRICT_CHECKS", "0") != "0",
    )


def _seconds(variables: Mapping[str, str], name: str) -> float | None:
    text = variables.get(name) or "-1"
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{name} takes seconds, or -1 for no limit, not {text!r}") from None
    return value if value > 0 else None
