"""How many pages each cache group gets. Knows sizes only: no tensors, no requests."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError

MOST_OF_FULL = 0.8  # of the pages of groups that keep everything, what windowed ones get by themselves at most


def reuse_unit(specs: Sequence[CacheSpec], page_size: int) -> int:
    """Tokens that a hit is a multiple of, whatever the group."""
    return math.lcm(page_size, *(spec.reuse_granularity for spec in specs))


def least_beside_chunk(window: int, unit: int, page_size: int) -> int:
    """Tokens of a windowed group that one request needs besides the chunk it computes.

    It holds up to two windows, as nodes are cut no finer, and a unit and two pages for what is not aligned.
    """
    return 2 * window + 2 * unit + 2 * page_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShares:
    """Splits memory between the groups that keep everything and those with a window.

    How long texts get is not known, so there is no best split: windowed groups need less the longer the texts are.
    With a `ratio` they get that share of the others' pages. Without one they get what they can make use of: the windows
    of all requests that may run, and once more as many, so that those which have ended can be continued; but no more
    than a fixed share, as short texts, which have no more windows than tokens, fill both kinds alike.
    In any case it is enough for one request with the largest chunk, and no more than the others have.
    """

    specs: tuple[CacheSpec, ...]
    page_bytes: tuple[int, ...]  # of one page of each group, in all its layers
    page_size: int  # tokens
    num_slots: int  # requests that may run
    chunk_size: int  # tokens
    ratio: float | None = None

    def pages(self, num_pages: int) -> tuple[int, ...]:
        """Of each group, if those that keep everything have `num_pages`; all without the padding page."""
        if all(spec.window is not None for spec in self.specs):
            return (num_pages,) * len(self.specs)
        return tuple(
            num_pages if spec.window is None else self._windowed(spec.window, num_pages) for spec in self.specs
        )

    def num_bytes(self, num_pages: int) -> int:
        """That these pages take, the padding pages included."""
        return sum((n + 1) * size for n, size in zip(self.pages(num_pages), self.page_bytes, strict=True))

    def that_fit(self, budget: int) -> int:
        """The most pages of the groups that keep everything, such that all groups fit in `budget` bytes.

        Raises:
            ConfigError: not even one request of a single page fits; the message has the numbers.
        """
        most = max(0, budget // min(self.page_bytes))
        num_pages = bisect_right(range(most + 1), budget, key=self.num_bytes) - 1
        if num_pages < 1:
            raise ConfigError(
                f"{budget / 2**20:.0f} MiB are left for the key-value cache, and one page of {self.page_size} tokens "
                f"takes {sum(self.page_bytes) / 2**20:.2f} MiB: raise --mem-fraction-static, or set --max-total-tokens"
            )
        return num_pages

    def _windowed(self, window: int, num_pages: int) -> int:
        size, unit = self.page_size, reuse_unit(self.specs, self.page_size)
        least = -(-(least_beside_chunk(window, unit, size) + max(self.chunk_size, unit)) // size)
        if self.ratio is not None:
            wanted = math.ceil(self.ratio * num_pages)
        else:
            useful = 2 * self.num_slots * -(-(window + unit + size) // size)
            wanted = min(math.ceil(MOST_OF_FULL * num_pages), useful)
        return min(num_pages, max(least, wanted))
