"""Searches tiles of grouped products by running them on the GPU at hand, over random experts."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import torch
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from hornbeam.ops.linear.contract import SCALE_BLOCK
from hornbeam.ops.moe.contract import ExpertsShape
from hornbeam.ops.moe.tiles import Tile, Tiles
from hornbeam.ops.moe.triton import StackedWeights, multiply_pairs
from hornbeam.ops.moe.triton_order import Order, order_by_expert
from hornbeam.weights.fp8 import draw_values, scales_shape

_BLOCK_ROWS = (16, 32, 64, 128)
_MOST_DRAWS = 4  # choices of experts that are timed together, so that weights do not come from the device's cache:
_LEAST_BYTES = 2**28  # so many of them, several times the cache
_REPEATS = 3
_HOPELESS = 1.3  # times the best so far: not timed again
_SHARED_MEMORY = 227 * 1024  # of a program, bytes
_SUMS = 128  # per thread
_MOST_PROGRAMS = 8  # per multiprocessor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """One product of the pairs of some tokens, for several draws of their experts."""

    run: Callable[[Order, Tile], None]
    orders: Sequence[Order]

    def launch(self, tile: Tile) -> None:
        for order in self.orders:
            self.run(order, tile)


class TileSearch:
    """Random experts of a shape, and times of their products."""

    def __init__(self, shape: ExpertsShape) -> None:
        self._shape = shape
        self._gate_up = _draw(shape, 2 * shape.intermediate_size, shape.hidden_size)
        self._down = _draw(shape, shape.hidden_size, shape.intermediate_size)
        self._compiled: set[int] = set()  # rows of blocks

    def _compile(self, block_m: int) -> None:
        """Compile all candidates, several at a time, since that takes longer than to run them."""
        if block_m in self._compiled:
            return
        self._compiled.add(block_m)
        jobs = [
            (case.launch, tile)
            for case, tiles in zip(self._cases(1, block_m), self._candidates(block_m), strict=True)
            for tile in tiles
            if tile.group == 1 and (tile.flatten or not tile.programs)
        ]
        _runs(*jobs[0])  # alone, since a kernel sets itself up once
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.synchronize) as pool:  # makes a context current
            list(tqdm(pool.map(lambda job: _runs(*job), jobs), total=len(jobs), desc="Kernels", leave=False))

    def best(self, num_tokens: int) -> Tiles:
        """The best tiles: for each number of rows in a block, of one product and of the other."""
        found: list[tuple[float, Tiles]] = []
        per_expert = num_tokens * self._shape.top_k / self._shape.num_experts
        for block_m in _BLOCK_ROWS:
            at_hand = block_m == _BLOCK_ROWS[-1] or per_expert <= 4 * block_m
            if at_hand and (block_m == _BLOCK_ROWS[0] or block_m <= 8 * per_expert):
                self._compile(block_m)
                gate_up, down = self._cases(num_tokens, block_m)
                gate_up_tiles, down_tiles = self._candidates(block_m)
                gate_up_seconds, gate_up_tile = _fastest(gate_up, gate_up_tiles)
                down_seconds, down_tile = _fastest(down, down_tiles)
                tiles = Tiles(block_m=block_m, gate_up=gate_up_tile, down=down_tile)
                found.append((gate_up_seconds + down_seconds, tiles))
        seconds, tiles = min(found, key=lambda entry: entry[0])
        tqdm.write(f"{num_tokens} tokens: {seconds * 1e6:.0f} us, {tiles}")
        return tiles

    def _cases(self, num_tokens: int, block_m: int) -> tuple[_Product, _Product]:
        """Gate and up, down."""
        shape, device = self._shape, self._shape.device
        torch.manual_seed(0)
        num_experts = min(num_tokens * shape.top_k, shape.num_experts)
        num_bytes = num_experts * self._down.values[0].nbytes
        num_draws = min(_MOST_DRAWS, -(-_LEAST_BYTES // num_bytes))
        draws = (torch.rand(num_tokens, shape.num_experts, device=device) for _ in range(num_draws))
        ids = (draw.topk(shape.top_k).indices.int() for draw in draws)
        orders = [order_by_expert(of_tokens, shape.num_experts, block_m) for of_tokens in ids]
        x = torch.randn(num_tokens, shape.hidden_size, dtype=shape.dtype, device=device)
        inner = x.new_empty(len(orders[0].pairs), shape.intermediate_size).normal_()
        out = x.new_empty(num_tokens * shape.top_k, shape.hidden_size)

        def first(order: Order, tile: Tile) -> None:
            multiply_pairs(x, self._gate_up, inner, order, tile, shape.unit)

        def second(order: Order, tile: Tile) -> None:
            multiply_pairs(inner, self._down, out, order, tile)

        return _Product(run=first, orders=orders), _Product(run=second, orders=orders)

    def _candidates(self, block_m: int) -> tuple[list[Tile], list[Tile]]:
        """Of gate and up, of down."""
        itemsize = self._shape.weight_dtype.itemsize
        return candidates(block_m, 2, itemsize), candidates(block_m, 1, itemsize)


def _draw(shape: ExpertsShape, *sizes: int) -> StackedWeights:
    """Random weights of all experts."""
    if shape.fp8 is None:
        return StackedWeights(torch.randn(shape.num_experts, *sizes, dtype=shape.dtype, device=shape.device))
    values = torch.empty(shape.num_experts, *sizes, dtype=shape.weight_dtype, device=shape.device)
    draw_values(values, torch.Generator(shape.device))
    return StackedWeights(values, None, torch.ones(scales_shape(values.shape), device=shape.device), shape.fp8)


def candidates(block_m: int, parts: int, itemsize: int) -> list[Tile]:
    """Tiles worth a try for blocks of `block_m` rows, of a product with `parts` outputs per column.

    Those of eight-bit weights lie within the blocks of their scales.
    """
    if itemsize == 1:
        depths = (3, 4, 5) if block_m < 64 else (3, 4)
        settings = product((32, 64, 128), (SCALE_BLOCK,), (4, 8), depths, (1, 16), (False, True))
    elif block_m < 64:
        settings = product((32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5), (1, 16), (False, True))
    else:
        settings = product((64, 128, 256), (64, 128), (4, 8), (3, 4), (1, 16), (False, True))
    found = []
    for n, k, warps, stages, group, flatten in settings:
        tile = Tile(block_n=n, block_k=k, group=group, num_warps=warps, num_stages=stages, flatten=flatten)
        programs = _programs(tile, block_m, parts, itemsize)
        if programs:
            found.append(dataclasses.replace(tile, programs=programs))
            if not flatten:
                found.append(tile)
    return found


def _programs(tile: Tile, block_m: int, parts: int, itemsize: int) -> int:
    """How many fit on a multiprocessor; 0, if their sums have no room in registers, or warps have too little to do."""
    weights = parts * tile.block_n * tile.block_k
    shared = tile.num_stages * (weights + block_m * tile.block_k) * itemsize
    sums = parts * tile.block_n * block_m / (32 * tile.num_warps)
    if sums > _SUMS or weights < 2048 * tile.num_warps:
        return 0
    return min(_SHARED_MEMORY // shared, 2048 // (32 * tile.num_warps), _MOST_PROGRAMS)


def _fastest(case: _Product, tiles: Sequence[Tile]) -> tuple[float, Tile]:
    """The seconds of one draw with the best of `tiles`, and that."""
    best, fastest = float("inf"), tiles[0]
    for tile in tiles:
        seconds = _seconds(case.launch, tile, _HOPELESS * best)
        if seconds < best:
            best, fastest = seconds, tile
    return best / len(case.orders), fastest


def _runs(launch: Callable[[Tile], None], tile: Tile) -> bool:
    """Launch; whether the device has the resources."""
    try:
        launch(tile)
    except OutOfResources:
        return False
    return True


def _seconds(launch: Callable[[Tile], None], tile: Tile, hopeless: float) -> float:
    """The least time on the device, as a graph, so that launching does not count; infinite if it cannot run.

    Above `hopeless` it is not timed again.
    """
    if not _runs(launch, tile):
        return float("inf")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        launch(tile)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    least = float("inf")
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        least = min(least, float(start.elapsed_time(end)) / 1000)
        if least > hopeless:
            break
    return least
