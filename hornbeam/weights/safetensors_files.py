"""Tensors of a Hugging Face folder's safetensors files, memory-mapped. Knows nothing of models or configurations."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from hornbeam.core.errors import ConfigError
from hornbeam.weights.read_ahead import read_ahead

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_POINTER, _LARGEST_POINTER = b"version https://git-lfs", 1024  # bytes


@dataclass(frozen=True, slots=True)
class SafetensorsFiles:
    """A `TensorSource` over files that together hold each tensor once."""

    paths: tuple[Path, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, from the files' headers. Raises ConfigError for a damaged file."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.paths:
            with _opened(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if name in shapes:
                        raise ConfigError(f"{path} repeats {name} of another file and there is no {_INDEX} to choose")
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes

    def read(self, names: Collection[str]) -> Iterator[tuple[str, "Tensor"]]:
        """The named tensors, file by file, each a view of the mapped file in the checkpoint's own dtype."""
        with read_ahead(self.paths) as next_file:
            for path in self.paths:
                next_file()
                with _opened(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118
                        if name in names:
                            yield name, file.get_tensor(name)


def find_safetensors(folder: Path) -> SafetensorsFiles:
    """The files that `model.safetensors.index.json` lists, or without one all `*.safetensors` of `folder`.

    Raises:
        ConfigError: there are none, or the index is broken or lists a file that is not there.
    """
    paths = find_files(folder, _INDEX, "*.safetensors")
    if not paths:
        raise ConfigError(
            f"{folder} holds no weights (*.safetensors, pytorch_model*.bin or a GGUF file); finish its download, or "
            "pass --load-format dummy to run with random ones"
        )
    return SafetensorsFiles(paths)


def find_files(folder: Path, index_name: str, pattern: str) -> tuple[Path, ...]:
    """The weight files that the index in `folder` lists, or without one all that match `pattern`; maybe none.

    Raises:
        ConfigError: the index is broken or lists a file that is not there.
    """
    index = folder / index_name
    if not index.exists():
        return tuple(sorted(folder.glob(pattern)))
    paths = _listed_files(index)
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise ConfigError(f"{index} lists {', '.join(absent)}, not there; finish the download of {folder}")
    return paths


def _listed_files(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return tuple(sorted(index.parent / name for name in names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not a usable index of weight files ({error!r}); download it again") from error


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError) as error:
        if path.is_file() and path.stat().st_size < _LARGEST_POINTER and path.read_bytes().startswith(_POINTER):
            raise ConfigError(f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull") from error
        raise ConfigError(f"cannot read {path}: {error}; is it truncated? Download it again") from error
