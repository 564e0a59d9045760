"""Where model and tokenizer come from, before anything is started."""

from pathlib import Path

import pytest

from hornbeam.serve.serving import with_model

pytestmark = pytest.mark.pure


def test_local_paths_are_taken(tmp_path: Path) -> None:
    user = {"model_path": str(tmp_path), "tokenizer_path": str(tmp_path / "absent"), "revision": "main"}
    assert with_model(user) == user
