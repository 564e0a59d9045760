"""Products by the vendor's library, with the fastest algorithm of those that it offers.

The library's own choice is often 5 to 20 % slower than another, most of all between 64 and 512 rows (its thread block
clusters wait for each other where tiles are few). So for the numbers of rows that steps will have, each algorithm is
timed on weights of the model at start. The answers are kept on disk, by device and version of the library.

With thousands of rows the device runs at its limit of power. Clocks fall, how far depends on what ran before, and
algorithms that move less data have higher ones: there the best take turns on a device that never rests.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.config.environment import read_environment
from hornbeam.ops.linear.cublaslt import CLUSTER_SHAPES, SWIZZLES, Algorithm, CublasLt, Setting

logger = logging.getLogger(__name__)

_CACHE_BYTES = 128 * 2**20  # written between two timings, so that weights come from memory
_NUM_TIMINGS = 3
_NUM_VARIED = 3  # offers, from the fastest on, of which variants are timed
_LEAST_GAIN = 0.03  # for another algorithm to be taken
_MANY_ROWS = 4096  # from here on an algorithm serves nearby numbers of rows, too
_NEARBY = 1.1
_NUM_FINALISTS = 4  # of those for many rows
_NUM_TURNS = 4  # of each; the first is not counted
_TURN_MS = 3

Product = tuple[str, int, int, int]  # dtype, rows, outputs, inputs


class LibraryProducts:
    """For each product the algorithm to use; None: the library's own choice."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError if there is no such library."""
        self._library = CublasLt(device)
        self._device = device
        self._choices: dict[Product, Algorithm | None] = {}
        self._many_rows = 0
        name = torch.cuda.get_device_name(device).replace(" ", "_")
        self._path = read_environment().cache_dir / "algorithms" / f"{name},cublaslt-{self._library.version}.json"

    def linear(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, K], weight [N, K] -> x W^T, [T, N]; added to a residual [T, N] in place."""
        num_rows = x.shape[0]
        if num_rows >= _MANY_ROWS and num_rows / _NEARBY <= self._many_rows <= num_rows * _NEARBY:
            num_rows = self._many_rows
        algorithm = self._choices.get(_product(x, weight, num_rows))
        if algorithm is not None:
            return self._library.linear(x, weight, algorithm, residual)
        return F.linear(x, weight) if residual is None else residual.addmm_(x, weight.T)

    def prepare(self, products: Sequence[tuple[int, Tensor]]) -> None:
        """Choose for each of `products`: a number of rows, and a weight [N, K]."""
        started = time.perf_counter()
        self._choices = _read(self._path)
        self._many_rows = max((num_rows for num_rows, _ in products if num_rows >= _MANY_ROWS), default=0)
        generator = torch.Generator(self._device).manual_seed(0)
        num_searches = 0
        for num_rows, weight in products:
            x = torch.empty((num_rows, weight.shape[1]), dtype=weight.dtype, device=self._device)
            product = _product(x, weight, num_rows)
            if product not in self._choices:
                self._choices[product] = self._search(x.normal_(generator=generator), weight)
                num_searches += 1
        if num_searches:
            _write(self._path, self._choices)
            seconds = time.perf_counter() - started
            logger.info("searched algorithms for %d products in %.1f s, kept in %s", num_searches, seconds, self._path)

    def _search(self, x: Tensor, weight: Tensor) -> Algorithm | None:
        """The fastest of what the library offers and of variants of the best offers; None: its own choice."""
        filler = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=self._device)
        own = _time(partial(F.linear, x, weight), filler)
        times = dict(self._timed(x, weight, self._library.offers(x, weight), filler))
        times.update(self._timed_variants(x, weight, times, CLUSTER_SHAPES, filler))
        if x.shape[0] >= _MANY_ROWS:
            swizzled = self._timed_variants(x, weight, times, SWIZZLES, filler)
            return self._steadiest(x, weight, (*_fastest(times, _NUM_FINALISTS), *swizzled), own)
        best = min(times, key=lambda algorithm: times[algorithm], default=None)
        return best if best is not None and times[best] < (1 - _LEAST_GAIN) * own else None

    def _steadiest(self, x: Tensor, weight: Tensor, algorithms: Sequence[Algorithm], own_ms: float) -> Algorithm | None:
        """The fastest under steady load; None: the library's own choice."""
        runs: list[Callable[[], Tensor]] = [partial(F.linear, x, weight)]
        runs.extend(partial(self._library.linear, x, weight, algorithm) for algorithm in algorithms)
        times = _time_in_turns(runs, max(1, round(_TURN_MS / own_ms)))
        return min(zip((None, *algorithms), times, strict=True), key=lambda timed: timed[1])[0]

    def _timed_variants(
        self, x: Tensor, weight: Tensor, times: Mapping[Algorithm, float], setting: Setting, filler: Tensor
    ) -> dict[Algorithm, float]:
        """Of the fastest algorithms; those that are not in `times`."""
        fastest = _fastest(times, _NUM_VARIED)
        variants = {v for a in fastest for v in self._library.variants(x, weight, a, setting) if v not in times}
        return dict(self._timed(x, weight, sorted(variants), filler))

    def _timed(
        self, x: Tensor, weight: Tensor, algorithms: Sequence[Algorithm], filler: Tensor
    ) -> Iterator[tuple[Algorithm, float]]:
        for algorithm in algorithms:
            try:
                yield algorithm, _time(partial(self._library.linear, x, weight, algorithm), filler)
            except RuntimeError as error:  # one that the library refuses after all
                logger.debug("an algorithm was left out: %s", error)


def _product(x: Tensor, weight: Tensor, num_rows: int) -> Product:
    num_out, num_in = weight.shape
    return str(x.dtype).removeprefix("torch."), num_rows, num_out, num_in


def _time(run: Callable[[], Tensor], filler: Tensor) -> float:
    """Milliseconds, the best of some runs on a cache full of other things."""
    run()
    events = []
    for _ in range(_NUM_TIMINGS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        filler.zero_()
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(filler.device)
    return min(float(start.elapsed_time(end)) for start, end in events)


def _time_in_turns(runs: Sequence[Callable[[], Tensor]], num_runs: int) -> list[float]:
    """Milliseconds of each turn of `num_runs`, the median of some; the device does not rest in between."""
    turns: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(_NUM_TURNS):
        for run, events in zip(runs, turns, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            for _ in range(num_runs):
                run()
            end.record()
            events.append((start, end))
    torch.cuda.synchronize()
    return [median(float(start.elapsed_time(end)) for start, end in events[1:]) for events in turns]


def _fastest(times: Mapping[Algorithm, float], number: int) -> list[Algorithm]:
    return sorted(times, key=lambda algorithm: times[algorithm])[:number]


def _read(path: Path) -> dict[Product, Algorithm | None]:
    try:
        table = msgspec.json.decode(path.read_bytes(), type=list[tuple[str, int, int, int, str | None]])
        return {(d, m, n, k): None if text is None else bytes.fromhex(text) for d, m, n, k, text in table}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        logger.warning("%s cannot be read (%s): algorithms are searched again", path, error)
        return {}


def _write(path: Path, choices: dict[Product, Algorithm | None]) -> None:
    """Whole or not at all, whoever else writes."""
    table = [(*product, None if algorithm is None else algorithm.hex()) for product, algorithm in choices.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{time.time_ns()}")
        draft.write_bytes(msgspec.json.encode(table))
        draft.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): algorithms are searched at each start", path, error)
