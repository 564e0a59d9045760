"""Where model and tokenizer come from, before anything is started."""

from pathlib import Path

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.serve.serving import with_model

pytestmark = pytest.mark.pure


def test_local_paths_are_taken(tmp_path: Path) -> None:
    user = {"model_path": str(tmp_path), "tokenizer_path": str(tmp_path / "absent"), "revision": "main"}
    assert with_model(user) == user


def test_code_of_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out --trust-remote-code"):
        with_model({"model_path": str(tmp_path), "trust_remote_code": True})
