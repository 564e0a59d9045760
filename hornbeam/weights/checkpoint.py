"""Opens a checkpoint of any format: its config, where its tokenizer lies, and a stream of its tensors by name.

Imports no torch (only reading tensors does): the server process uses it too. Does not know what a model does with
the tensors.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hornbeam.core.errors import ConfigError
from hornbeam.weights.gguf import FLOAT_TYPES, read_gguf, split_paths
from hornbeam.weights.gguf_tensors import GgufTensors, hugging_face_config, special_ids
from hornbeam.weights.mxfp4_tensors import Mxfp4Tensors
from hornbeam.weights.safetensors_files import SafetensorsFiles, find_safetensors
from hornbeam.weights.torch_files import TorchFiles, find_torch_files

if TYPE_CHECKING:
    from torch import Tensor

CheckpointFormat = Literal["safetensors", "pt", "gguf", "dummy"]


class TensorSource(Protocol):
    """Where a checkpoint's tensors come from."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by its Hugging Face name; reads headers only."""

    def read(self, names: Collection[str]) -> Iterator[tuple[str, "Tensor"]]:
        """The named tensors on the CPU, one at a time, in the order that is fastest to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint. `hf_config` and `generation_config` are as in Hugging Face's json files."""

    path: Path
    format: CheckpointFormat
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_path: Path  # a folder with tokenizer.json, or the GGUF file
    source: TensorSource  # dummy: holds nothing
    quantized: bool = False  # weights are integers with a scale for each group
    first_file: Path | None = None  # of the weights, in the order in which they are read; dummy: None


def open_checkpoint(path: Path, load_format: str = "auto", overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open the folder or GGUF file at `path`; `overrides` replace top-level keys of its config.

    load_format: "safetensors", "pt" (PyTorch's *.bin), "gguf", "dummy" (config only), or "auto": by the files that are
        there.

    Raises:
        ConfigError: something is not there or damaged; names the file and what to do.
    """
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist; --model-path takes a folder with config.json and weights, a GGUF file, or a hub "
            "id (organisation/name)"
        )
    gguf = _find_gguf(path, load_format)
    checkpoint = _open_folder(path, load_format) if gguf is None else _open_gguf(gguf, load_format)
    checkpoint.hf_config.update(overrides or {})
    return checkpoint


def _open_folder(folder: Path, load_format: str) -> Checkpoint:
    config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    weights_format, files = _find_weights(folder, load_format)
    source: TensorSource = files
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4":
        source = Mxfp4Tensors(source)
    return Checkpoint(
        path=folder,
        format=weights_format,
        hf_config=config,
        generation_config=_read_json(generation) if generation.exists() else {},
        tokenizer_path=folder,
        source=source,
        first_file=files.paths[0] if files.paths else None,
    )


def _find_weights(folder: Path, load_format: str) -> tuple[CheckpointFormat, SafetensorsFiles | TorchFiles]:
    if load_format == "dummy":
        return "dummy", SafetensorsFiles(())
    old = load_format == "auto" and not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin"))
    if old or load_format == "pt":
        return "pt", find_torch_files(folder)
    return "safetensors", find_safetensors(folder)


def _open_gguf(path: Path, load_format: str) -> Checkpoint:
    file = read_gguf(path)
    dummy = load_format == "dummy"
    return Checkpoint(
        path=path,
        format="dummy" if dummy else "gguf",
        hf_config=hugging_face_config(file),
        generation_config=special_ids(file),
        tokenizer_path=path,
        source=SafetensorsFiles(()) if dummy else GgufTensors(file),
        quantized=not dummy and any(tensor.type_name not in FLOAT_TYPES for tensor in file.tensors.values()),
        first_file=None if dummy else path,
    )


def _find_gguf(path: Path, load_format: str) -> Path | None:
    """The GGUF file to read, None if the checkpoint is a folder of another format."""
    if path.is_file():
        if load_format in ("safetensors", "pt"):
            raise ConfigError(f"{path} is a file; --load-format {load_format} takes a folder")
        return path
    if load_format in ("safetensors", "pt", "dummy") or (load_format == "auto" and any(path.glob("*.safetensors"))):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1 and not set(found) <= set(split_paths(found[0])):
        raise ConfigError(f"{path} holds several GGUF files; give the path of one: {', '.join(p.name for p in found)}")
    if not found and load_format == "gguf":
        raise ConfigError(f"{path} holds no GGUF file; give the path of one, or leave out --load-format")
    return found[0] if found else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path.parent} has no {path.name}; --model-path takes a complete Hugging Face folder, or a GGUF file"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
