"""Times products with weights that come from memory: each by itself, and as they stand in a model.

There norms are ahead and behind. They are launched early and let their successors begin early, so that what a product
does around its main kernel (a second one that adds up parts, memory that is cleared) costs more, or less, than it does
by itself. That takes graphs: launches take longer than small products. Knows nothing of how algorithms are chosen.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from math import inf
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hornbeam.ops.linear.cublaslt import Algorithm, CublasLt
from hornbeam.ops.norm.triton import BACKEND as NORM

_CACHE_BYTES = 96 * 2**20  # more than the device's cache holds
_FILLER_BYTES = 128 * 2**20  # that takes longer to write than a product to launch
_NUM_ROUNDS = 3
_WORTH_A_ROUND = 1.15  # times the fastest
_NUM_TURNS = 4  # the first is not counted
_EPS = 1e-5

Run = Callable[[], object]


class Way(NamedTuple):
    """How to compute a product."""

    algorithm: Algorithm
    num_parts: int = 1  # stretches of the inputs that are summed up apart


class ProductInModel:
    """One product and the norms around it.

    weights: [N, K] each; those of several layers, so that none stays in the device's cache.
    """

    def __init__(self, library: CublasLt, x: Tensor, weights: Sequence[Tensor], hidden_size: int) -> None:
        self.x = x
        self.weight = weights[0]
        num_out, num_in = self.weight.shape
        self.returns = num_out == hidden_size <= num_in  # to the running sum of the model
        self._library = library
        self._weights = list(islice(weights, max(2, -(-_CACHE_BYTES // self.weight.nbytes))))
        self._sum = torch.zeros((x.shape[0], hidden_size), dtype=x.dtype, device=x.device)
        self._norm_weight = torch.ones_like(self._sum[0])

    def alone(self, way: Way) -> Run:
        """The product with one of the weights."""
        return partial(self._multiply, way, self.weight)

    def in_layers(self, way: Way) -> Run:
        """With all weights that it takes to fill the cache, and a norm behind each. Nothing is left to compile."""

        def multiply_and_norm(weight: Tensor) -> None:
            out = self._multiply(way, weight)
            if way.num_parts > 1:
                NORM.add_rms_norm(out, self._sum, self._norm_weight, _EPS)
            else:
                NORM.rms_norm(self._sum, self._norm_weight, _EPS)

        def run() -> None:
            for weight in self._weights:
                multiply_and_norm(weight)

        multiply_and_norm(self.weight)
        return run

    def _multiply(self, way: Way, weight: Tensor) -> Tensor:
        residual = self._sum if self.returns and way.num_parts == 1 else None
        return self._library.linear(self.x, weight, way.algorithm, residual, way.num_parts)


class Stopwatch:
    """Milliseconds, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._filler = torch.empty(_FILLER_BYTES, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)

    def singly(self, runs: Sequence[Run], num_rounds: int) -> list[float]:
        """Each by itself on a cache full of other things, the best of some rounds; infinite for those that raise.

        Those that are clearly slower have one round only.
        """
        times = [inf] * len(runs)
        left = [i for i, run in enumerate(runs) if _works(run)]
        for _ in range(num_rounds):
            events = []
            for i in left:
                self._filler.zero_()
                events.append(_recorded(runs[i]))
            torch.cuda.synchronize()
            for i, (start, end) in zip(left, events, strict=True):
                times[i] = min(times[i], start.elapsed_time(end))
            left = [i for i in left if times[i] < _WORTH_A_ROUND * min(times)]
        return times

    def in_graphs(self, runs: Sequence[Run]) -> list[float]:
        """Each as a graph, the best of some rounds."""
        memory = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graphs = [_captured(run, memory) for run in runs]
            rounds = [[_recorded(graph.replay) for graph in graphs] for _ in range(_NUM_ROUNDS)]
            self._stream.synchronize()
        return [min(start.elapsed_time(end) for start, end in of_one) for of_one in zip(*rounds, strict=True)]

    def in_turns(self, runs: Sequence[Run], num_runs: int) -> list[float]:
        """Each `num_runs` times on a device that does not rest, the median of some turns."""
        turns = [[_recorded(run, num_runs) for run in runs] for _ in range(_NUM_TURNS)]
        torch.cuda.synchronize()
        return [median(start.elapsed_time(end) for start, end in of_one) for of_one in zip(*turns[1:], strict=True)]


def _works(run: Run) -> bool:
    try:
        run()
    except RuntimeError:  # the library refuses the algorithm after all
        return False
    return True


def _recorded(run: Run, num_runs: int = 1) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    start.record()
    for _ in range(num_runs):
        run()
    end.record()
    return start, end


def _captured(run: Run, memory: Any) -> torch.cuda.CUDAGraph:
    """As `Platform.capture` does, but here nobody reads what the graph computes."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=memory, capture_error_mode="thread_local")
    try:
        run()
    finally:
        graph.capture_end()
    return graph
