"""Against a hub cache laid out by hand, without a network."""

from pathlib import Path

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.weights.hub import local_path

constants = pytest.importorskip("huggingface_hub.constants")

pytestmark = pytest.mark.pure

COMMIT = "0" * 40


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub's client keeps of org/tiny at its main branch."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--tiny"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors", "small.gguf"):
        (folder / name).touch()
    return folder


def test_what_is_there_is_taken(tmp_path: Path) -> None:
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path("no/hub/id/at/all") == Path("no/hub/id/at/all")
    assert local_path("absent") == Path("absent")


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_an_id_is_found_in_the_cache(snapshot: Path, revision: str | None) -> None:
    assert local_path("org/tiny", revision) == snapshot
    assert local_path("org/tiny", revision, "dummy") == snapshot
    assert local_path("org/tiny/small.gguf", revision) == snapshot / "small.gguf"


@pytest.mark.parametrize("path", ["org/other", "org/tiny/large.gguf", "org/--bad--"])
@pytest.mark.usefixtures("snapshot")
def test_what_cannot_be_had_is_told(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot fetch {path} from the Hugging Face hub.*--model-path"):
        local_path(path)


@pytest.mark.usefixtures("snapshot")
def test_a_revision_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="org/tiny at revision v9"):
        local_path("org/tiny", "v9")
