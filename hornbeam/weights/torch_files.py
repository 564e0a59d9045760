"""Tensors of a Hugging Face folder's PyTorch files (`*.bin`), read as weights only: nothing in them is executed."""

import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hornbeam.core.errors import ConfigError
from hornbeam.weights.read_ahead import read_ahead
from hornbeam.weights.safetensors_files import find_files

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TorchFiles:
    """A `TensorSource` over files that together hold each tensor once."""

    paths: tuple[Path, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name. Raises ConfigError for a damaged file, or one that holds other objects."""
        return {name: tuple(tensor.shape) for path in self.paths for name, tensor in _open(path).items()}

    def read(self, names: Collection[str]) -> Iterator[tuple[str, "Tensor"]]:
        """The named tensors, file by file, in the checkpoint's own dtype."""
        with read_ahead(self.paths) as next_file:
            for path in self.paths:
                next_file()
                for name, tensor in _open(path).items():
                    if name in names:
                        yield name, tensor


def find_torch_files(folder: Path) -> TorchFiles:
    """The files that `pytorch_model.bin.index.json` lists, or without one all `pytorch_model*.bin` of `folder`.

    Raises:
        ConfigError: there are none, or the index is broken or lists a file that is not there.
    """
    paths = find_files(folder, "pytorch_model.bin.index.json", "pytorch_model*.bin")
    if not paths:
        raise ConfigError(f"{folder} holds no pytorch_model*.bin; leave out --load-format to take what is there")
    return TorchFiles(paths)


def _open(path: Path) -> Mapping[str, "Tensor"]:
    """The file's tensors by name: mapped, but read into memory if the file is of the format before 2020."""
    import torch  # here, because the server process does without

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what is raised depends on where the damage is
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "weights_only" in reason:  # torch would have code in the file run
            reason = "it holds more than plain tensors (code in weight files is not run), or is damaged"
        raise ConfigError(f"cannot read {path} as weights: {reason}; is it truncated? Download it again") from error
    tensors: dict[str, Tensor] = dict(content) if isinstance(content, Mapping) else {"": content}
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()):
        raise ConfigError(f"{path} must hold tensors by name and nothing else")
    return tensors
