"""Building the kernels: once, in a private folder; where that cannot be, others serve."""

from pathlib import Path

import pytest

from hornbeam.ops.attention.contract import DECODE_ATTENTION
from hornbeam.ops.native import loader
from hornbeam.ops.query import OpQuery

pytestmark = pytest.mark.cpu
QUERY = OpQuery(device="cpu", dtype="float32", num_heads=4, num_kv_heads=2, head_dim=16, page_size=16)
LACKING = loader.needs_library(QUERY)
needs_native = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))


def compiler(folder: Path, script: str) -> str:
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_native
def test_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    fake = compiler(tmp_path, f'echo run >> {count}; while [ "$1" != -o ]; do shift; done; echo made > "$2"')
    monkeypatch.setattr(loader.shutil, "which", lambda name: fake)
    paths = {loader._built(tmp_path / "new" / "native") for _ in range(3)}
    assert len(paths) == 1
    assert paths.pop().read_text() == "made\n"
    assert count.read_text() == "run\n"
    assert len(list((tmp_path / "new" / "native").iterdir())) == 1


@needs_native
def test_says_why_it_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = compiler(tmp_path, "echo 'In file x' >&2; echo 'x.c:1: error: no such thing' >&2; exit 1")
    monkeypatch.setattr(loader.shutil, "which", lambda name: fake)
    with pytest.raises(RuntimeError, match="the C compiler failed: x"):
        loader._built(tmp_path / "native")
    monkeypatch.setattr(loader.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs a C compiler"):
        loader._built(tmp_path / "native")


@needs_native
def test_code_is_loaded_from_private_folders_only(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "native").chmod(0o777)
    with pytest.raises(RuntimeError, match="must belong to the user alone"):
        loader._built(tmp_path / "native")


def test_others_serve_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_missing", lambda: "needs a C compiler")
    choice = DECODE_ATTENTION.choose(QUERY)
    assert choice.name == "cpu"
    assert ("native", "needs a C compiler") in choice.skipped


def test_other_devices_and_formats_are_refused() -> None:
    for device, dtype in (("cuda", "float32"), ("cpu", "bfloat16")):
        assert loader.needs_library(OpQuery(**{**_fields(QUERY), "device": device, "dtype": dtype}))


def _fields(query: OpQuery) -> dict[str, object]:
    return {name: getattr(query, name) for name in query.__slots__}
