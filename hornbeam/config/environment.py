"""The environment, read in one place. No other module looks at `os.environ` for a setting of Hornbeam."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLES = ("HORNBEAM_CACHE_DIR", "HORNBEAM_DISABLED_MODEL_ARCHS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment says."""

    cache_dir: Path  # for downloads
    disabled_architectures: frozenset[str]  # never imported


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """HORNBEAM_CACHE_DIR (default: hornbeam/ in XDG_CACHE_HOME or ~/.cache) and HORNBEAM_DISABLED_MODEL_ARCHS."""
    base = variables.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    disabled = variables.get("HORNBEAM_DISABLED_MODEL_ARCHS", "")
    return Environment(
        cache_dir=Path(variables.get("HORNBEAM_CACHE_DIR") or Path(base) / "hornbeam"),
        disabled_architectures=frozenset(name.strip() for name in disabled.split(",") if name.strip()),
    )
