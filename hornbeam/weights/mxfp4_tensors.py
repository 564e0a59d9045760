"""Checkpoints whose experts are MXFP4, read as if they were not: blocks and scales of a tensor become the tensor."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_SIZE = 32


class _Source(Protocol):
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `TensorSource`, which is declared where this is used."""

    def read(self, names: Collection[str]) -> Iterator[tuple[str, "Tensor"]]:
        """Likewise."""


@dataclass(frozen=True, slots=True)
class Mxfp4Tensors:
    """A `TensorSource` over another one. X_blocks and X_scales of outputs by inputs are X, of inputs by outputs."""

    source: _Source

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self.source.shapes().items():
            if name.endswith(_BLOCKS):
                num_experts, num_rows, num_groups, _ = shape
                shapes[name.removesuffix(_BLOCKS)] = (num_experts, num_groups * _BLOCK_SIZE, num_rows)
            elif not name.endswith(_SCALES):
                shapes[name] = shape
        return shapes

    def read(self, names: Collection[str]) -> Iterator[tuple[str, "Tensor"]]:
        """The named tensors, in file order; those that were MXFP4 in bfloat16."""
        from hornbeam.quant.mxfp4 import dequantize  # imports torch, which the server process does without

        packed = {name.removesuffix(_BLOCKS) for name in self.source.shapes() if name.endswith(_BLOCKS)}
        wanted = {name for name in names if name not in packed}
        wanted |= {name + suffix for name in packed.intersection(names) for suffix in (_BLOCKS, _SCALES)}
        waiting: dict[str, Tensor] = {}  # the half that came first
        for name, tensor in self.source.read(wanted):
            whole = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
            if whole not in packed:
                yield name, tensor
            elif whole not in waiting:
                waiting[whole] = tensor
            else:
                first = waiting.pop(whole)
                blocks, scales = (tensor, first) if name.endswith(_BLOCKS) else (first, tensor)
                yield whole, dequantize(blocks, scales).transpose(1, 2)
