from pathlib import Path

import pytest

from hornbeam.weights import read_ahead as module
from hornbeam.weights.read_ahead import read_ahead, read_early

pytestmark = pytest.mark.pure


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which chunks were read."""
    chunks: list[tuple[str, int]] = []
    plain = module._read
    monkeypatch.setattr(module, "_CHUNK_BYTES", 10)
    monkeypatch.setattr(module, "_read", lambda path, start: chunks.append((path.name, start)) or plain(path, start))
    return chunks


def test_all_chunks_of_all_files(tmp_path: Path, read: list[tuple[str, int]]) -> None:
    paths = [tmp_path / name for name in ("a", "missing", "b")]
    for path in (paths[0], paths[2]):
        path.write_bytes(bytes(25))
    with read_ahead(paths) as next_file:
        for _ in paths:
            next_file()
        while len(read) < 6:
            pass
    assert sorted(read) == [("a", 0), ("a", 10), ("a", 20), ("b", 0), ("b", 10), ("b", 20)]


def test_reading_early(tmp_path: Path, read: list[tuple[str, int]]) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(95))
    read_early(path)
    while len(read) < 10:
        pass
    assert sorted(start for _, start in read) == list(range(0, 95, 10))
    read_early(tmp_path / "missing")


def test_no_more_than_one_file_ahead(tmp_path: Path, read: list[tuple[str, int]]) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(bytes(5))
    with read_ahead(paths) as next_file:
        next_file()
        while len(read) < 2:
            pass
    assert {name for name, _ in read} == {"a", "b"}


def test_an_early_end(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), read_ahead([tmp_path / "missing"] * 9):
        raise RuntimeError("stop")
