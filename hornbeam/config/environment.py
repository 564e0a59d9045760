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
    "HORNBEAM_STALE_LOCK_AGE_MINUTES",
    "HORNBEAM_STRICT_CHECKS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment says."""

    cache_dir: Path  # for downloads
    disabled_architectures: frozenset[str]  # never imported
    waiting_timeout: float | None  # seconds that a request may wait, None: as long as it takes
    running_timeout: float | None
    stale_lock_seconds: float  # age from which the lock of a build counts as left behind
    build_caches: tuple[Path, ...]  # where libraries keep what they compile, with locks
    strict_checks: bool  # an error in the cache's books ends the engine, rather than being logged


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """HORNBEAM_CACHE_DIR (default: hornbeam/ in XDG_CACHE_HOME or ~/.cache) and HORNBEAM_DISABLED_MODEL_ARCHS.

    HORNBEAM_REQ_WAITING_TIMEOUT and HORNBEAM_REQ_RUNNING_TIMEOUT are seconds; -1, the default, sets no limit.
    HORNBEAM_STALE_LOCK_AGE_MINUTES (default: 30): locks in the caches of FlashInfer and of torch's compilers that are
    older, and that nobody holds, are removed at the start. HORNBEAM_STRICT_CHECKS=1 is for tests.

    Raises:
        ConfigError: a time that is no number.
    """
    base = variables.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    disabled = variables.get("HORNBEAM_DISABLED_MODEL_ARCHS", "")
    return Environment(
        cache_dir=Path(variables.get("HORNBEAM_CACHE_DIR") or Path(base) / "hornbeam"),
        disabled_architectures=frozenset(name.strip() for name in disabled.split(",") if name.strip()),
        waiting_timeout=_seconds(variables, "HORNBEAM_REQ_WAITING_TIMEOUT"),
        running_timeout=_seconds(variables, "HORNBEAM_REQ_RUNNING_TIMEOUT"),
        stale_lock_seconds=_number(variables, "HORNBEAM_STALE_LOCK_AGE_MINUTES", "30", "minutes") * 60,
        build_caches=_build_caches(variables),
        strict_checks=variables.get("HORNBEAM_STRICT_CHECKS", "0") != "0",
    )


def _build_caches(variables: Mapping[str, str]) -> tuple[Path, ...]:
    flashinfer = Path(variables.get("FLASHINFER_WORKSPACE_BASE") or Path.home()) / ".cache/flashinfer"
    extensions = variables.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions"
    return flashinfer, Path(extensions)


def _seconds(variables: Mapping[str, str], name: str) -> float | None:
    value = _number(variables, name, "-1", "seconds, or -1 for no limit")
    return value if value > 0 else None


def _number(variables: Mapping[str, str], name: str, default: str, unit: str) -> float:
    text = variables.get(name) or default
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} takes {unit}, not {text!r}") from None
