"""Flags from a YAML file, for `--config`."""

import json
from pathlib import Path
from typing import Any

from hornbeam.core.errors import ConfigError


def read_config_file(path: Path) -> dict[str, Any]:
    """Values by flag name, as `check_flags` takes them: dashes or underscores, objects for flags that take JSON.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping of flags to values.
    """
    import yaml  # only for those who have such a file

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"--config {path} must map flags to values, such as 'port: 8000'")
    return {
        name.strip("-").replace("-", "_"): json.dumps(value) if isinstance(value, dict) else value
        for name, value in content.items()
    }
