"""Products by the vendor's library, with the fastest algorithm of those that it offers.

The library's own choice is often 5 to 20 % slower than another, most of all between 64 and 512 rows (its thread block
clusters wait for each other where tiles are few). So for the numbers of rows that steps will have, each algorithm is
timed on weights of the model at start. The answers are kept on disk, by device and version of the library.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.config.environment import read_environment
from hornbeam.ops.linear.cublaslt import Algorithm, CublasLt

logger = logging.getLogger(__name__)

_CACHE_BYTES = 128 * 2**20  # written between two timings, so that weights come from memory
_NUM_TIMINGS = 3
_NUM_VARIED = 3  # offers, from the fastest on, of which variants are timed
_LEAST_GAIN = 0.03  # for another algorithm to be taken
_MANY_ROWS = 4096  # from here on an algorithm serves nearby numbers of rows, too
_NEARBY = 1.1

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
        self._path = read_environment().cache_dir / "products" / f"{name},cublaslt-{self._library.version}.json"

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K], weight [N, K] -> x W^T, [T, N]."""
        num_rows = x.shape[0]
        if num_rows >= _MANY_ROWS and num_rows / _NEARBY <= self._many_rows <= num_rows * _NEARBY:
            num_rows = self._many_rows
        algorithm = self._choices.get(_product(x, weight, num_rows))
        return F.linear(x, weight) if algorithm is None else self._library.linear(x, weight, algorithm)

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
        for offer in sorted(times, key=lambda algorithm: times[algorithm])[:_NUM_VARIED]:
            variants = (v for v in self._library.variants(x, weight, offer) if v not in times)
            times.update(self._timed(x, weight, list(variants), filler))
        best = min(times, key=lambda algorithm: times[algorithm], default=None)
        return best if best is not None and times[best] < (1 - _LEAST_GAIN) * own else None

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
