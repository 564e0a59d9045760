"""The page pool: every page is with one holder or free, and page 0 with nobody."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hornbeam.cache.pages import PADDING_PAGE, PagePool

pytestmark = pytest.mark.pure


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_pages_are_handed_out_once(commands: list[tuple[bool, int]]) -> None:
    pool, held = PagePool(12), []
    for take, number in commands:
        if take:
            pages = pool.allocate(number)
            assert (pages is None) == (number > 11 - len(held))
            held += pages or []
        else:
            pool.free(held[:number])
            del held[:number]
        assert len(set(held)) == len(held) == pool.num_taken
        assert set(held) <= set(range(1, 12))
        assert pool.num_free == 11 - len(held)


def test_mistakes_are_found() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    assert pages is not None
    pool.free(pages[:1])
    for wrong in (pages[:1], [PADDING_PAGE], [4], [-1]):
        with pytest.raises(AssertionError):
            pool.free(wrong)
    with pytest.raises(AssertionError, match="padding"):
        PagePool(1)
