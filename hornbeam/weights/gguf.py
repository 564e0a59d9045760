"""Reads the container format GGUF (versions 2 and 3, little endian): metadata, and the tensors' bytes, mapped.

Knows how the file is laid out, not what metadata or tensor names mean, nor how a quantized block is decoded.
Source of the format: the GGUF specification in the ggml repository (docs/gguf.md).
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hornbeam.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # how the files of one split are named

# ggml type id -> (name, elements per block, bytes per block)
_TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

FLOAT_TYPES = ("F32", "F16", "BF16")  # names of types whose elements are numbers by themselves

# metadata type id -> struct code of a scalar; the other two ids are strings and arrays
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor. `shape` is row-major (the last dimension is contiguous), `data` its bytes, mapped read-only."""

    name: str
    shape: tuple[int, ...]
    type_name: str  # ggml's: "F32", "Q4_1", ...
    data: "npt.NDArray[np.uint8]"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """Metadata as Python values (arrays as lists) and tensors by name, in file order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of `path` and map its tensors; their bytes are read from disk when they are used.

    Of a file that was split, `path` may be any part; metadata is that of the first.

    Raises:
        ConfigError: the file cannot be read, is not GGUF, or is damaged, or a part is missing; the message says where.
    """
    paths = split_paths(path)
    absent = [part.name for part in paths if not part.exists()]
    if absent and path.exists():
        raise ConfigError(f"{path} is one part of several, and {', '.join(absent)} is not there; fetch all parts")
    files = [_read_file(part) for part in paths]
    count = files[0].metadata.get("split.count") or 1
    if count != len(files):
        raise ConfigError(f"{path} is one of {count} parts, but is not named like one: ...-00001-of-{count:05}.gguf")
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    return GgufFile(path=path, metadata=files[0].metadata, tensors=tensors)


def split_paths(path: Path) -> list[Path]:
    """The paths of all parts, in order, if `path` is named like a part of a split file; else itself alone."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    return [path.with_name(f"{stem}-{part:05}-of-{count}.gguf") for part in range(1, int(count) + 1)] or [path]


def _read_file(path: Path) -> GgufFile:
    import numpy as np  # here, since a server starts 0.1 s sooner without it, and most models are in other files

    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ConfigError(f"cannot read {path}: {error}") from error
    reader = _Reader(path, mapped)
    num_tensors, num_entries = reader.header()
    metadata = {}
    for _ in range(num_entries):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("I"), key)
    infos = [reader.tensor_info() for _ in range(num_tensors)]

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise reader.damaged(f"general.alignment is {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    tensors = {info[0]: _map_tensor(reader, start, *info) for info in infos}
    if len(tensors) < len(infos):
        raise reader.damaged("it names a tensor twice")
    _refuse_overlaps(reader, [(info[3], tensors[info[0]]) for info in infos], alignment)
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _map_tensor(
    reader: "_Reader", start: int, name: str, shape: tuple[int, ...], type_id: int, offset: int
) -> GgufTensor:
    """The view of a tensor whose data lies `offset` bytes behind `start`."""
    if type_id not in _TENSOR_TYPES:
        raise reader.damaged(f"tensor {name} has the unknown ggml type {type_id}")
    type_name, block_len, block_bytes = _TENSOR_TYPES[type_id]
    if shape and shape[-1] % block_len:
        raise reader.damaged(f"tensor {name} has rows of {shape[-1]} elements, but {type_name} packs {block_len}")
    first, num_bytes = start + offset, math.prod(shape) // block_len * block_bytes
    if first + num_bytes > reader.mapped.size:
        raise reader.damaged(
            f"tensor {name} ends at byte {first + num_bytes}, but the file has {reader.mapped.size}; is it truncated?"
        )
    return GgufTensor(name=name, shape=shape, type_name=type_name, data=reader.mapped[first : first + num_bytes])


def _refuse_overlaps(reader: "_Reader", placed: list[tuple[int, GgufTensor]], alignment: int) -> None:
    end = 0
    for offset, tensor in sorted(placed, key=lambda item: item[0]):
        if offset < end or offset % alignment:
            raise reader.damaged(f"tensor {tensor.name} begins at {offset}, inside another one or between two places")
        end = offset + tensor.data.size


class _Reader:
    """A position in the mapped file; every read checks the bounds."""

    def __init__(self, path: Path, mapped: "npt.NDArray[np.uint8]") -> None:
        self.path, self.mapped, self.position = path, mapped, 0
        self._view = memoryview(mapped)  # type: ignore[arg-type]  # numpy arrays are buffers; the stubs say so from 3.12

    def damaged(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path} is not a usable GGUF file: {what}. Fetch or convert it again.")

    def take(self, num_bytes: int) -> memoryview:
        end = self.position + num_bytes
        if end > len(self._view):
            raise self.damaged(f"it ends inside its header, after {len(self._view)} bytes; is it truncated?")
        taken, self.position = self._view[self.position : end], end
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return str(self.take(self.scalar("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text before byte {self.position} is not UTF-8") from error

    def header(self) -> tuple[int, int]:
        """Check magic and version; returns the number of tensors and of metadata entries."""
        if self.mapped.size < 24 or self.take(4) != _MAGIC:
            raise self.damaged("it does not begin with a GGUF header")
        version = self.scalar("I")
        if version not in _VERSIONS:
            raise self.damaged(f"its version is {version}; versions 2 and 3 in little endian are supported")
        return self.scalar("Q"), self.scalar("Q")

    def value(self, type_id: int, key: str) -> Any:
        """One metadata value."""
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            raise self.damaged(f"metadata {key} has the unknown type {type_id}")
        element_id, length = self.scalar("I"), self.scalar("Q")
        if element_id in _SCALARS:
            code = "<" + _SCALARS[element_id]
            return [value for (value,) in struct.iter_unpack(code, self.take(length * struct.calcsize(code)))]
        if element_id != _STRING:  # arrays of arrays are legal, but nothing writes them
            raise self.damaged(f"metadata {key} is an array of the unsupported type {element_id}")
        return [self.string() for _ in range(length)]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, row-major shape, ggml type id, offset from the start of the data."""
        name, num_dimensions = self.string(), self.scalar("I")
        sizes = [self.scalar("Q") for _ in range(num_dimensions)]
        return name, tuple(reversed(sizes)), self.scalar("I"), self.scalar("Q")
