from pathlib import Path

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.engine.build import build_engine

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"architectures": ["Unheard"]}', "no model family serves Unheard"),
    ],
)
def test_overrides_reach_the_config(tmp_path: Path, overrides: str, reason: str) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(ConfigError, match=reason):
        build_engine({"model_path": str(tmp_path), "load_format": "dummy", "json_model_override_args": overrides})
