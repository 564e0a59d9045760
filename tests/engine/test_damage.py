"""A checkpoint with one damaged, truncated or wrong file, of every kind: one error that names the file, never another.

What is damaged at random may still be readable; then it is served.
"""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import make_engine
from safetensors.torch import load_file, save_file

from hornbeam.core.errors import ConfigError, HornbeamError
from hornbeam.engine.build import _eos_ids
from hornbeam.models.index import find_family
from hornbeam.serve.defaults import choose_template, sampling_defaults
from hornbeam.text.loading import load_tokenizer
from hornbeam.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.cpu

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
WRONG = {"empty": "", "html": "<html>404</html>", "pointer": LFS_POINTER, "list": "[]", "number": "3", "null": "null"}
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors")
VALUES = [None, [], {}, "x", -1, 0, 1e30, True, [1], {"a": 1}, [None]]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[str], Path]:
    """folder(file) -> a sound checkpoint in which `file` counts."""

    def make(file: str) -> Path:
        target = tmp_path / "model"
        shutil.copytree(tiny_checkpoint, target)
        whole = target / "model.safetensors"
        tensors = load_file(whole)
        if file.startswith("pytorch_model"):
            whole.unlink()
            torch.save(tensors, target / "pytorch_model.bin")
        parts = {"model-00001-of-00002.safetensors": dict(list(tensors.items())[:5])}
        parts["model-00002-of-00002.safetensors"] = dict(list(tensors.items())[5:])
        if file.startswith("model") and file != "model.safetensors":
            whole.unlink()
            for name, part in parts.items():
                save_file(part, target / name)
        if file.startswith("model-") or file == INDEXES[0]:
            places = {tensor: name for name, part in parts.items() for tensor in part}
            (target / INDEXES[0]).write_text(json.dumps({"weight_map": places}))
        return target

    return make


def start(path: Path) -> None:
    """Read all that a server needs, and load the weights."""
    read(path)
    make_engine(path)


def read(path: Path) -> None:
    """All but the weights."""
    checkpoint = open_checkpoint(path)
    find_family(checkpoint.hf_config).parse(checkpoint.hf_config)
    _eos_ids(checkpoint)
    sampling_defaults(checkpoint.generation_config)
    choose_template(load_tokenizer(checkpoint.tokenizer_path), None, None)


@pytest.mark.parametrize("file", WEIGHTS)
def test_what_is_sound_is_served(folder: Callable[[str], Path], file: str) -> None:
    start(folder(file))


@pytest.mark.parametrize("file", [*JSON_FILES, *INDEXES, *WEIGHTS])
@pytest.mark.parametrize("content", WRONG)
def test_a_wrong_file_is_named(folder: Callable[[str], Path], file: str, content: str) -> None:
    path = folder(file) / file
    path.write_text(WRONG[content])
    with pytest.raises(ConfigError) as caught:
        start(path.parent)
    assert file in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("file", [*JSON_FILES, *INDEXES[:1], *WEIGHTS])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_truncated_file_is_named(folder: Callable[[str], Path], file: str, share: float) -> None:
    path = folder(file) / file
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ConfigError, match=file.replace(".", r"\.")):
        start(path.parent)


@pytest.mark.parametrize("file", JSON_FILES)
def test_values_of_wrong_types(folder: Callable[[str], Path], file: str) -> None:
    path, chance = folder(file) / file, random.Random(0)
    content = json.loads(path.read_text())
    for name in content:
        for value in chance.sample(VALUES, 4):
            path.write_text(json.dumps(content | {name: value}))
            with contextlib.suppress(HornbeamError):
                read(path.parent)
