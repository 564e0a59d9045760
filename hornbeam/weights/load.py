"""Fills a built model's parameters, in place, from a checkpoint by declared names.

Knows neither file formats nor families: a checkpoint streams tensors, and a family's weight map says where each goes.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product, starmap
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hornbeam.core.errors import ConfigError
from hornbeam.core.family import Placement
from hornbeam.core.fp8 import Fp8Format
from hornbeam.layers.linear import Linear
from hornbeam.layers.moe import StackedLinear
from hornbeam.layers.parameters import block_parts
from hornbeam.weights.checkpoint import Checkpoint
from hornbeam.weights.fp8 import (
    SCALES,
    fill_rounded,
    in_blocks,
    keeps_blocks,
    read_widened,
    scales_place,
    scales_shape,
)

_NUM_FILLERS = 4
_PROGRESS_DELAY = 1.0  # seconds of loading before a bar is worth drawing
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"  # follows from the config; old checkpoints store it
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@torch.no_grad()
def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    weight_map: Mapping[str, Placement],
    unread: tuple[str, ...] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
    fp8: Fp8Format | None = None,
) -> None:
    """Copy each tensor of `checkpoint` to its place in `model`, converted to the parameter's dtype and device.

    A few tensors at a time are in memory besides the model; progress is drawn on a terminal if it takes long.
    unread: beginnings of the names of tensors that may be there, and are left out.
    aliases: beginning of names in the map -> what some checkpoints have in its place.
    fp8: of the checkpoint's weights. Where the model has such weights and the checkpoint has not, they are rounded.

    Raises:
        ConfigError: the checkpoint's names and shapes are not exactly those that the map and the model ask for, or a
            tensor cannot be read. Names and shapes are checked before anything is copied.
    """
    weight_map = _as_stored(weight_map, checkpoint.source.shapes(), aliases)
    _check_coverage(model, weight_map)
    stored = set() if fp8 is None else in_blocks(model, weight_map, fp8)
    kept = {name for name, place in weight_map.items() if keeps_blocks(model, place)}
    places = {**weight_map, **{name + SCALES: scales_place(weight_map[name]) for name in stored & kept}}
    targets = {name: _target(model, placement) for name, placement in places.items()}
    shapes = {name: _shape(target, places[name]) for name, target in targets.items()}
    shapes |= {name + SCALES: scales_shape(shapes[name]) for name in stored - kept}
    _check_shapes(checkpoint, shapes, unread)

    def fill(name: str, tensor: Tensor) -> int:
        target, value = targets[name], _transformed(tensor, places[name])
        if name in kept - stored:
            fill_rounded(target, _target(model, scales_place(places[name])), value, power_of_two=False)
        elif value.is_floating_point() and (target.dtype == torch.float8_e4m3fn) == (
            value.dtype == torch.float8_e4m3fn
        ):
            target.copy_(value)
        else:
            raise ConfigError(
                f"{name} in {checkpoint.path} is {value.dtype}, which its config's quantization_config does not say"
            )
        return target.nbytes

    tensors = read_widened(checkpoint.source, targets, stored - kept)
    on_cpu = all(target.device.type == "cpu" for target in targets.values())
    total = sum(target.nbytes for target in targets.values())
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, delay=_PROGRESS_DELAY, disable=None
    ) as progress:
        for num_bytes in _in_threads(fill, tensors) if on_cpu else starmap(fill, tensors):
            progress.update(num_bytes)


def _in_threads(fill: Callable[[str, Tensor], int], tensors: Iterator[tuple[str, Tensor]]) -> Iterator[int]:
    """What `fill` returns of each; several at once, because most of the time goes into faults of single pages."""
    filling: deque[Future[int]] = deque()
    with ThreadPoolExecutor(_NUM_FILLERS, thread_name_prefix="fill") as pool:
        for name, tensor in tensors:
            filling.append(pool.submit(fill, name, tensor))
            if len(filling) > _NUM_FILLERS:
                yield filling.popleft().result()
        yield from (future.result() for future in filling)


def unpermute_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo the row order of query and key projections of models that rotate neighbours.

    There, as in most GGUF files, what are rows i and i + D/2 of each head of D rows here stand side by side.
    tensor: [num_heads * D, ...] or [num_heads, D]; returns the same shape with the pairs D/2 apart again.
    """
    others = tensor.shape[1:] if tensor.shape[0] > num_heads else ()
    heads = tensor.view(num_heads, -1, 2, *others)
    return heads.transpose(1, 2).reshape(tensor.shape)


def ungroup_heads(tensor: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """From each key-value head's queries, key and value to all queries, all keys, all values.

    tensor: [num_kv_heads * (queries per head + 2) * head_dim, ...]; returns the same shape.
    """
    groups = tensor.view(num_kv_heads, -1, head_dim, *tensor.shape[1:])
    return torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])


def _as_stored(
    weight_map: Mapping[str, Placement], stored: Collection[str], aliases: Mapping[str, str]
) -> Mapping[str, Placement]:
    """The map with each name that is not stored replaced by its alias, if that is."""
    others = {
        name: alias + name.removeprefix(beginning)
        for name in weight_map
        for beginning, alias in aliases.items()
        if name.startswith(beginning) and name not in stored
    }
    return {others[name] if others.get(name) in stored else name: placement for name, placement in weight_map.items()}


def _transformed(tensor: Tensor, placement: Placement) -> Tensor:
    match placement.transform:
        case "unpermute_heads":
            return unpermute_heads(tensor, placement.heads)
        case "ungroup_heads":
            return ungroup_heads(tensor, placement.heads, placement.head_dim)
        case "add_one":
            return tensor.float() + 1
        case "transpose":
            return tensor.transpose(-1, -2)
        case "pairs" | "transpose_pairs":
            # all outputs of gate, then all of up
            outputs: Tensor = tensor.unflatten(-1, (-1, 2)).movedim(-1, -2).flatten(-2)
            return outputs if placement.transform == "pairs" else outputs.transpose(-1, -2)
        case "none":
            return tensor


def _target(model: nn.Module, placement: Placement) -> Tensor:
    """The parameter, or the rows of it, that `placement` means: a view to write through."""
    parameter = model.get_parameter(placement.parameter).detach()
    owner = model.get_submodule(placement.parameter.rpartition(".")[0])
    dim = 0
    if isinstance(owner, StackedLinear):
        parameter, dim = (parameter, 1) if placement.expert is None else (parameter[placement.expert], 0)
    if placement.part is None or not isinstance(owner, Linear | StackedLinear):
        return parameter
    scales = placement.parameter.endswith(".scales")
    return parameter.split_with_sizes(block_parts(owner.parts) if scales else owner.parts, dim)[placement.part]


def _check_coverage(model: nn.Module, weight_map: Mapping[str, Placement]) -> None:
    """A family's map must fill every part of every parameter of its own model, or memory stays uninitialised."""
    sizes: dict[str, tuple[int, int]] = {}  # experts and parts
    for name, _ in model.named_parameters():
        if name.endswith(".scales"):  # they follow their weights
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        num_parts = len(owner.parts) if isinstance(owner, Linear | StackedLinear) else 1
        sizes[name] = owner.num_experts if isinstance(owner, StackedLinear) else 1, num_parts
    expected = {(name, *place) for name, size in sizes.items() for place in product(*map(range, size))}
    filled: set[tuple[str, int, int]] = set()
    for place in weight_map.values():
        num_experts, num_parts = sizes[place.parameter]
        experts = range(num_experts) if place.expert is None else (place.expert,)
        parts = range(num_parts) if place.part is None else (place.part,)
        filled |= {(place.parameter, *pair) for pair in product(experts, parts)}
    assert filled == expected, f"weight map and model disagree on {sorted(filled ^ expected)}"


def _shape(target: Tensor, placement: Placement) -> tuple[int, ...]:
    """Of the checkpoint's tensor."""
    *rest, rows, columns = target.shape if target.dim() > 1 else (1, *target.shape)
    return (*rest, columns, rows) if placement.transform in ("transpose", "transpose_pairs") else tuple(target.shape)


def _check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], unread: tuple[str, ...]) -> None:
    shapes = {name: shape for name, shape in checkpoint.source.shapes().items() if not name.startswith(unread)}
    misfits = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "not known to the model": sorted(n for n in shapes.keys() - expected.keys() if not _idle(n, shapes)),
        "of the wrong shape": [
            f"{name} {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    refuse_misfits(checkpoint.path, misfits)


def refuse_misfits(path: Path, misfits: Mapping[str, Collection[str]]) -> None:
    """Raise ConfigError if any tensors of the checkpoint at `path` do not fit: what is wrong -> their names."""
    if any(misfits.values()):
        problems = (
            line
            for what, names in misfits.items()
            if names
            for line in (f"{len(names)} tensors {what}:", *(f"  {name}" for name in names))
        )
        raise ConfigError(
            f"the weights in {path} do not fit its config:\n"
            + "\n".join(problems)
            + "\nCheck that config and weights belong together and that the download is complete."
        )


def _idle(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tensor that the map lacks may be left unread: derived numbers, the copy that a tied head is."""
    return name.endswith(_DERIVED_SUFFIX) or (name == _HEAD and shapes[name] == shapes.get(_EMBEDDING))
