"""What a step brings to the layers besides its ids: `model.forward(ids, positions, fwd)`."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hornbeam.ops.attention.contract import Attend, LatentAttend


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """The pages of one layer, and the cache group whose page numbers they follow."""

    group: int
    tensors: tuple[Tensor, ...]  # [P, S, *row shape] for each row shape of the group: keys and values, or less


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupForward:
    """One cache group's part of a step."""

    rows: Tensor  # [T] int64: page * S + offset where what is cached of each token goes
    decode: Attend | LatentAttend | None  # for the first num_decode tokens
    prefill: Attend | LatentAttend | None  # for the rest; for all tokens if `prefills_all`


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """One step, T tokens: decode tokens first, then the chunks. Borrowed for the step, never kept."""

    num_decode: int
    caches: tuple[LayerCache, ...]  # by layer
    groups: tuple[GroupForward, ...]  # by cache group
    prefills_all: bool = False  # a graph must serve any number of rows: all tokens have both kinds of attention
    wanted: Tensor | None = None  # [R] int64: the tokens whose hidden rows the model returns; None: all, in order
    input_embeds: Tensor | None = None  # [T, H]: taken instead of looking the ids up; written over
    padding: Tensor | None = None  # [T] bool: rows that stand for no token; None: there is none
    adapters: Tensor | None = None  # [T] adapter slot of each token; None: no adapter in this step
    collect_layers: tuple[int, ...] = ()  # layers whose hidden rows are wanted


class Model(Protocol):
    """What a family's `build` returns, as far as steps are concerned."""

    def __call__(self, ids: Tensor, positions: Tensor, fwd: Forward) -> Tensor:
        """Ids and positions [T] int64 -> hidden rows [T, H], of the tokens that are wanted."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V]."""
