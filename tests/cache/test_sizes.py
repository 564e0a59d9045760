"""How memory is split between groups that keep everything and groups with a window."""

import pytest

from hornbeam.cache.sizes import PageShares
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError

pytestmark = pytest.mark.pure

FULL = CacheSpec(kind="full", layers=(1,), row_shapes=((2, 8), (2, 8)), dtype="float32")
WINDOW = CacheSpec(kind="window", layers=(0, 2), row_shapes=((2, 8), (2, 8)), dtype="float32", window=64)


def shares(*specs: CacheSpec, ratio: float | None = None) -> PageShares:
    sizes = tuple(100 * len(spec.layers) for spec in specs)
    return PageShares(specs=specs, page_bytes=sizes, page_size=16, num_slots=10, chunk_size=256, ratio=ratio)


def test_groups_of_one_kind_share_alike() -> None:
    assert shares(FULL, FULL).pages(7) == (7, 7)
    assert shares(WINDOW, WINDOW).pages(7) == (7, 7)


def test_a_window_gets_what_it_can_use() -> None:
    least = (2 * 64 + 2 * 16 + 2 * 16 + 256) // 16
    assert shares(FULL, WINDOW).pages(10) == (10, 10)
    assert shares(FULL, WINDOW).pages(30) == (30, least)
    assert shares(FULL, WINDOW).pages(100) == (100, 80)
    assert shares(WINDOW, FULL).pages(1000) == (2 * 10 * (64 + 16 + 16) // 16, 1000)


def test_a_ratio_is_taken_as_far_as_it_works() -> None:
    assert shares(FULL, WINDOW, ratio=0.5).pages(100) == (100, 50)
    assert shares(FULL, WINDOW, ratio=0.01).pages(100) == (100, 28)
    assert shares(FULL, WINDOW, ratio=1.0).pages(1000) == (1000, 1000)


def test_a_budget_is_used_up() -> None:
    for split in (shares(FULL), shares(FULL, WINDOW), shares(FULL, WINDOW, ratio=0.3), shares(WINDOW)):
        for budget in (600, 1234, 5000, 20000, 100000):
            num_pages = split.that_fit(budget)
            assert split.num_bytes(num_pages) <= budget < split.num_bytes(num_pages + 1)


def test_a_budget_too_small_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"0 MiB are left.*--mem-fraction-static"):
        shares(FULL, WINDOW).that_fit(599)
    with pytest.raises(ConfigError):
        shares(FULL).that_fit(-5)
