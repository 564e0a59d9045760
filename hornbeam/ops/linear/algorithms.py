"""Products by the vendor's library, with the fastest algorithm of those that it offers.

The library's own choice is often 5 to 20 % slower than another, most of all between 64 and 512 rows (its thread block
clusters wait for each other where tiles are few). So for the numbers of rows that steps will have, algorithms are timed
on weights of the model at start: all of them once, then the best ones as the model will run them. The answers are kept
on disk, by device and version of the library; those for some well-known shapes come with the package.

Few outputs of many inputs make few tiles, and part of the device stays idle. Such inputs can be cut into stretches,
which are summed up side by side; the norm behind adds the sums up. The library can do that, too, but needs a kernel of
its own for it.

With thousands of rows the device runs at its limit of power. Clocks fall, how far depends on what ran before, and
algorithms that move less data have higher ones: there the best take turns on a device that never rests.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from hornbeam.config.environment import read_environment
from hornbeam.ops.linear.cublaslt import CLUSTER_SHAPES, SWIZZLES, Algorithm, CublasLt, Setting
from hornbeam.ops.linear.timing import ProductInModel, Stopwatch, Way
from hornbeam.ops.norm.contract import PART_COUNTS

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "products"

_NUM_FINALISTS = 4
_NUM_SPLIT_FINALISTS = 2  # for each number of parts
_LEAST_STRETCH = 64  # inputs; a part has a multiple of them
_MANY_ROWS = 4096  # from here on an algorithm serves nearby numbers of rows, too
_NEARBY = 1.1
_NUM_ROUNDS = 2
_TURN_MS = 3

Product = tuple[str, int, int, int]  # dtype, rows, outputs, inputs


@dataclass(frozen=True, slots=True)
class Choice:
    """For a product by itself, and for one that goes to the running sum of a model."""

    alone: Algorithm
    added: Way


class LibraryProducts:
    """For each product that was searched the best algorithm; for others the library's own choice."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError if there is no such library."""
        self._library = CublasLt(device)
        self._device = device
        self._many_rows = 0
        device_name = torch.cuda.get_device_name(device).replace(" ", "_")
        name = f"{device_name},cublaslt-{self._library.version}.json"
        self._path = read_environment().cache_dir / "products" / name
        self._shipped = _read(SHIPPED / name)
        self._choices = self._shipped | _read(self._path)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, K], weight [N, K] -> x W^T, [T, N]."""
        choice = self._choice(x, weight)
        return F.linear(x, weight) if choice is None else self._library.linear(x, weight, choice.alone)

    def added(self, x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `LinearProduct.added`."""
        choice = self._choice(x, weight)
        if choice is None:
            return residual.addmm_(x, weight.T), None
        algorithm, num_parts = choice.added
        if num_parts > 1:
            return self._library.linear(x, weight, algorithm, num_parts=num_parts), residual
        return self._library.linear(x, weight, algorithm, residual), None

    def prepare(self, products: Sequence[tuple[int, Sequence[Tensor]]]) -> None:
        """Choose for each of `products`: a number of rows, and weights [N, K] of some layers."""
        started = time.perf_counter()
        self._many_rows = max((num_rows for num_rows, _ in products if num_rows >= _MANY_ROWS), default=0)
        searched = [(n, weights) for n, weights in products if not self._knows(n, weights[0])]
        if not searched:
            return
        # The size that most weights have is that of the model's hidden rows.
        sizes = Counter(size for _, weights in products for size in weights[0].shape)
        hidden_size = min(sizes, key=lambda size: (-sizes[size], size))
        search = _Search(self._library, self._device)
        generator = torch.Generator(self._device).manual_seed(0)
        for num_rows, weights in searched:
            x = torch.empty((num_rows, weights[0].shape[1]), dtype=weights[0].dtype, device=self._device)
            product = ProductInModel(self._library, x.normal_(generator=generator), weights, hidden_size)
            try:
                choice = search.choose(product)
            except RuntimeError as error:
                logger.warning("the search of algorithms failed (%s): other products take the library's choice", error)
                break
            if choice is not None:
                self._choices[_key(weights[0], num_rows)] = choice
        _write(self._path, {p: choice for p, choice in self._choices.items() if choice is not self._shipped.get(p)})
        seconds = time.perf_counter() - started
        logger.info("searched algorithms for %d products in %.1f s, kept in %s", len(searched), seconds, self._path)

    def _knows(self, num_rows: int, weight: Tensor) -> bool:
        """Whether there is a choice: one that was searched here, or a shipped one that the library accepts."""
        key = _key(weight, num_rows)
        choice = self._choices.get(key)
        if choice is None or choice is not self._shipped.get(key):
            return choice is not None
        x = torch.empty((num_rows, weight.shape[1]), dtype=weight.dtype, device="meta")
        for algorithm, num_parts in ((choice.alone, 1), choice.added):
            if not self._library.allows(x, weight, algorithm, num_parts):
                logger.debug("the library refuses what was shipped for %s", key)
                del self._choices[key]
                return False
        return True

    def _choice(self, x: Tensor, weight: Tensor) -> Choice | None:
        num_rows = x.shape[0]
        if num_rows >= _MANY_ROWS and num_rows / _NEARBY <= self._many_rows <= num_rows * _NEARBY:
            num_rows = self._many_rows
        return self._choices.get(_key(weight, num_rows))


class _Search:
    """For the best algorithm of what the library offers and of variants of its best offer."""

    def __init__(self, library: CublasLt, device: torch.device) -> None:
        self._library = library
        self._watch = Stopwatch(device)

    def choose(self, product: ProductInModel) -> Choice | None:
        """None: the library cannot do it."""
        many = product.x.shape[0] >= _MANY_ROWS
        return self._choose_by_turns(product) if many else self._choose_by_graphs(product)

    def _choose_by_graphs(self, product: ProductInModel) -> Choice | None:
        finalists = _fastest(self._times(product, 1), _NUM_FINALISTS)
        if not finalists:
            return None
        for num_parts in PART_COUNTS if product.returns else ():
            if product.weight.shape[1] % (num_parts * _LEAST_STRETCH) == 0:
                finalists += _fastest(self._times(product, num_parts), _NUM_SPLIT_FINALISTS)
        times = self._watch.in_graphs([product.in_layers(way) for way in finalists])
        ranked = [way for _, way in sorted(zip(times, finalists, strict=True))]
        return Choice(next(way.algorithm for way in ranked if way.num_parts == 1), ranked[0])

    def _choose_by_turns(self, product: ProductInModel) -> Choice | None:
        times = self._times(product, 1, num_rounds=1)
        if not times:
            return None
        finalists = _fastest(times, _NUM_FINALISTS)
        finalists += self._variants(product, finalists, SWIZZLES)
        num_runs = max(1, round(_TURN_MS / min(times.values())))
        turns = self._watch.in_turns([product.alone(way) for way in finalists], num_runs)
        _, best = min(zip(turns, finalists, strict=True))
        return Choice(best.algorithm, best)

    def _times(self, product: ProductInModel, num_parts: int, num_rounds: int = _NUM_ROUNDS) -> dict[Way, float]:
        """Of each way that works."""
        offers = self._library.offers(product.x, product.weight, num_parts)
        times = self._timed(product, [Way(offer, num_parts) for offer in offers], num_rounds)
        return times | self._timed(product, self._variants(product, _fastest(times, 1), CLUSTER_SHAPES), num_rounds)

    def _timed(self, product: ProductInModel, ways: Sequence[Way], num_rounds: int) -> dict[Way, float]:
        times = self._watch.singly([product.alone(way) for way in ways], num_rounds)
        return {way: time for way, time in zip(ways, times, strict=True) if time < inf}

    def _variants(self, product: ProductInModel, ways: Sequence[Way], setting: Setting) -> list[Way]:
        """Of `ways`, those among them left out."""
        found = set[Way]()
        for algorithm, num_parts in ways:
            variants = self._library.variants(product.x, product.weight, algorithm, setting, num_parts)
            found |= {Way(variant, num_parts) for variant in variants}
        return sorted(found.difference(ways))


def _fastest(times: Mapping[Way, float], number: int) -> list[Way]:
    return sorted(times, key=lambda way: times[way])[:number]


def _key(weight: Tensor, num_rows: int) -> Product:
    num_out, num_in = weight.shape
    return str(weight.dtype).removeprefix("torch."), num_rows, num_out, num_in


def _read(path: Path) -> dict[Product, Choice]:
    try:
        table = msgspec.json.decode(path.read_bytes(), type=list[tuple[str, int, int, int, Choice]])
        return {(dtype, m, n, k): choice for dtype, m, n, k, choice in table}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        logger.warning("%s cannot be read (%s): algorithms are searched again", path, error)
        return {}


def _write(path: Path, choices: dict[Product, Choice]) -> None:
    """Whole or not at all, whoever else writes."""
    table = [(*product, choice) for product, choice in choices.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{time.time_ns()}")
        draft.write_bytes(msgspec.json.encode(table))
        draft.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): algorithms are searched at each start", path, error)
