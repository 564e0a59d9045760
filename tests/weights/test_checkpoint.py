import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hornbeam.core.errors import ConfigError
from hornbeam.models.index import find_family
from hornbeam.weights.checkpoint import open_checkpoint
from hornbeam.weights.gguf_tensors import hugging_face_name

from .conftest import LLAMA_METADATA, llama_tensors

pytestmark = pytest.mark.pure

INDEX = "model.safetensors.index.json"
WEIGHT = {"w": np.zeros((2, 3), dtype=np.float32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder with one tensor."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A"], "hidden_size": 8}))
    save_file(WEIGHT, tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = open_checkpoint(folder, overrides={"hidden_size": 16})
    assert checkpoint.format == "safetensors"
    assert checkpoint.hf_config == {"architectures": ["A"], "hidden_size": 16}
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.tokenizer_path == folder
    assert checkpoint.source.shapes() == {"w": (2, 3)}


def test_dummy_needs_only_the_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(folder, "dummy")
    assert checkpoint.format == "dummy"
    assert checkpoint.source.shapes() == {}


def test_shards_follow_the_index(folder: Path) -> None:
    save_file({"other": np.zeros(4, dtype=np.float16)}, folder / "b.safetensors")
    save_file({"w": np.zeros(9, dtype=np.float32)}, folder / "unlisted.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "model.safetensors", "other": "b.safetensors"}}))
    assert open_checkpoint(folder).source.shapes() == {"w": (2, 3), "other": (4,)}


def test_gguf_speaks_hugging_face(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf()
    checkpoint = open_checkpoint(path.parent)
    assert checkpoint.format == "gguf"
    assert checkpoint.tokenizer_path == path
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    assert checkpoint.hf_config == {
        "architectures": ["gguf:llama"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 0.5,
        "rope_theta": 1000.0,
        "rotary_dim": 4,
        "vocab_size": 32,
        "dtype": "float32",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert checkpoint.source.shapes()["model.layers.0.self_attn.k_proj.weight"] == (4, 8)
    assert open_checkpoint(path, "dummy").source.shapes() == {}


def test_gguf_rotary_scaling_and_turn_end(write_gguf: Callable[..., Path]) -> None:
    more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "tokenizer.ggml.eot_token_id": 5}
    checkpoint = open_checkpoint(write_gguf(LLAMA_METADATA | more))
    assert checkpoint.hf_config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert checkpoint.generation_config["eos_token_id"] == [2, 5]


def test_gguf_names() -> None:
    assert hugging_face_name("blk.12.attn_q_norm.weight") == "model.layers.12.self_attn.q_norm.weight"
    assert hugging_face_name("output.weight") == "lm_head.weight"
    assert hugging_face_name("blk.0.unheard_of.weight") == "blk.0.unheard_of.weight"
    assert hugging_face_name("odd") == "odd"
    assert hugging_face_name("blk.1.ffn_norm.weight") == "model.layers.1.post_attention_layernorm.weight"
    between = hugging_face_name("blk.1.ffn_norm.weight", between_norms=True)
    assert between == "model.layers.1.pre_feedforward_layernorm.weight"


@pytest.mark.parametrize(
    ("metadata", "tensors", "reason"),
    [
        ({}, {}, "lacks an architecture"),
        (LLAMA_METADATA | {"split.count": 2}, {}, "one of 2 parts, but is not named like one"),
    ],
)
def test_unusable_gguf(write_gguf: Callable[..., Path], metadata: dict, tensors: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"tiny\.gguf.*{reason}"):
        open_checkpoint(write_gguf(metadata, llama_tensors() | tensors))


@pytest.mark.parametrize("wrong", [0, 2**31, 3.5, "x", "", ["a"], True])
def test_gguf_values_of_wrong_types(write_gguf: Callable[..., Path], wrong: Any) -> None:
    for entry in LLAMA_METADATA:
        with contextlib.suppress(ConfigError):
            checkpoint = open_checkpoint(write_gguf(LLAMA_METADATA | {entry: wrong}))
            find_family(checkpoint.hf_config, model_impl="hornbeam").parse(checkpoint.hf_config)


def spoil(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def duplicate(folder: Path) -> None:
    save_file(WEIGHT, folder / "second.safetensors")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (spoil("config.json", "{"), r"config\.json is not readable JSON"),
        (spoil("config.json", "[]"), r"config\.json must hold a JSON object"),
        (spoil("generation_config.json", "{,}"), r"generation_config\.json is not readable"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights.*dummy"),
        (spoil(INDEX, '{"weight_map": {"w": "gone.safetensors"}}'), r"lists gone\.safetensors.*finish the download"),
        (spoil(INDEX, "{}"), "not a usable index"),
        (spoil(INDEX, '{"weight_map": {"w": 3}}'), "not a usable index"),
        (spoil("config.json", "[" * 100000), r"config\.json is not readable JSON"),
        (spoil("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "pointer of git-lfs"),
        (truncate, r"model\.safetensors.*truncated"),
        (duplicate, r"second\.safetensors repeats w"),
    ],
)
def test_damaged_folders(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=reason):
        open_checkpoint(folder).source.shapes()


def test_absent_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent does not exist; --model-path takes"):
        open_checkpoint(tmp_path / "absent")


def test_load_formats_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no GGUF file"):
        open_checkpoint(folder, "gguf")
    with pytest.raises(ConfigError, match="takes a folder"):
        open_checkpoint(folder / "model.safetensors", "safetensors")
    (folder / "a.gguf").touch()
    (folder / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"several.*a\.gguf, b\.gguf"):
        open_checkpoint(folder, "gguf")


def test_opening_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys, pathlib; from hornbeam.weights.checkpoint import open_checkpoint; "
        "open_checkpoint(pathlib.Path(sys.argv[1])).source.shapes(); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
