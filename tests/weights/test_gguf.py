import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.weights.gguf import read_gguf

pytestmark = pytest.mark.pure

WriteGguf = Callable[..., Path]


@pytest.mark.parametrize("version", [2, 3])
def test_values_and_tensors_come_back(write_gguf: WriteGguf, version: int) -> None:
    metadata = {"name": "größer 🙂", "flag": True, "count": 7, "share": 0.5, "ids": [1, 2, 3], "tokens": ["a", "", "é"]}
    tensors = {"first": np.arange(6, dtype=np.float32).reshape(2, 3), "second": np.ones(5, dtype=np.float32)}
    file = read_gguf(write_gguf(metadata, tensors, version))
    assert file.metadata == metadata
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {"first": (2, 3), "second": (5,)}
    for name, tensor in file.tensors.items():
        assert tensor.type_name == "F32"
        assert not tensor.data.flags.owndata
        np.testing.assert_array_equal(tensor.data.view(np.float32).reshape(tensor.shape), tensors[name])


def test_a_file_cut_anywhere_is_refused_by_name(write_gguf: WriteGguf) -> None:
    path = write_gguf({"tokens": ["a", "b"], "ids": [1, 2]}, {"only": np.ones(8, dtype=np.float32)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"tiny\.gguf"):
            read_gguf(path)


def test_damage_never_escapes_as_another_error(write_gguf: WriteGguf) -> None:
    path = write_gguf({"tokens": ["a", "b"], "ids": [1, 2]}, {"only": np.ones((2, 4), dtype=np.float32)})
    whole, chance = path.read_bytes(), random.Random(0)
    num_refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except ConfigError:
            num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot read"),
        (b"PK\x03\x04" + bytes(100), "does not begin with a GGUF header"),
        (b"GGUF\x01\x00\x00\x00" + bytes(100), "version is 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "little endian"),
    ],
)
def test_what_is_not_gguf_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_gguf(path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"blk.0.attn_k.weight", b"blk.0.attn_v.weight", "names a tensor twice"),
        (
            b"output_norm.weight" + struct.pack("<IQIQ", 1, 8, 0, 1024),
            b"output_norm.weight" + struct.pack("<IQIQ", 1, 8, 0, 0),
            "inside another one",
        ),
    ],
)
def test_tensors_in_each_others_place(write_gguf: WriteGguf, old: bytes, new: bytes, reason: str) -> None:
    path = write_gguf()
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ConfigError, match=reason):
        read_gguf(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.gguf"):
        read_gguf(tmp_path / "absent.gguf")


def test_block_sizes_equal_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf.constants")
    from hornbeam.weights.gguf import _TENSOR_TYPES

    theirs = {t.value: (t.name, *sizes) for t, sizes in constants.GGML_QUANT_SIZES.items()}
    assert {type_id: theirs[type_id] for type_id in _TENSOR_TYPES} == _TENSOR_TYPES
