import json
from pathlib import Path

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.weights.checkpoint import open_checkpoint

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.cpu

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Exploit:
    """What a hostile file may hold: an object that runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A"]}))
    return tmp_path


@pytest.mark.parametrize("zipped", [True, False])
def test_one_file(folder: Path, zipped: bool) -> None:
    tensors = {"w": torch.randn(2, 3), "v": torch.arange(4, dtype=torch.bfloat16)}
    torch.save(tensors, folder / SINGLE, _use_new_zipfile_serialization=zipped)
    torch.save({"lr": 1}, folder / "training_args.bin")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "pt"
    assert checkpoint.source.shapes() == {"w": (2, 3), "v": (4,)}
    for name, tensor in checkpoint.source.read({"v"}):
        assert name == "v"
        assert torch.equal(tensor, tensors["v"])


def test_shards_follow_the_index(folder: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for name, file in zip("ab", names, strict=True):
        torch.save({name: torch.zeros(3)}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    assert open_checkpoint(folder, "pt").source.shapes() == {"a": (3,), "b": (3,)}
    (folder / names[1]).unlink()
    with pytest.raises(ConfigError, match=r"lists pytorch_model-00002-of-00002\.bin, not there"):
        open_checkpoint(folder)


def test_nothing_is_executed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": Exploit()}, folder / SINGLE)
    with pytest.raises(ConfigError, match=r"cannot read .*pytorch_model\.bin as weights"):
        open_checkpoint(folder).source.shapes()
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"\x80\x02garbage"])
def test_damage(folder: Path, content: bytes) -> None:
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin as weights"):
        open_checkpoint(folder).source.shapes()


def test_truncation_and_other_objects(folder: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, folder / SINGLE)
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="truncated"):
        open_checkpoint(folder).source.shapes()
    for other in ({"epoch": 3}, {3: torch.zeros(2)}, [torch.zeros(2)]):
        torch.save(other, folder / SINGLE)
        with pytest.raises(ConfigError, match="tensors by name and nothing else"):
            open_checkpoint(folder).source.shapes()
    (folder / SINGLE).unlink()
    with pytest.raises(ConfigError, match=r"holds no pytorch_model\*\.bin"):
        open_checkpoint(folder, "pt")
