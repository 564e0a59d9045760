"""Which pages of a cache group are free.

Knows numbers only: not what a page holds, nor who holds it. Page 0 is never handed out: padded rows of a step
read and write it.
"""

from collections.abc import Sequence

PADDING_PAGE = 0


class PagePool:
    """The pages `1 .. num_pages - 1` of one cache group."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, f"{num_pages} pages leave none beside the padding page"
        self.num_usable = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._taken = bytearray(num_pages)  # 1: handed out

    @property
    def num_free(self) -> int:
        """Pages that can be allocated."""
        return len(self._free)

    @property
    def num_taken(self) -> int:
        """Pages handed out."""
        return self.num_usable - len(self._free)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take `num_pages` pages, or None (and take none) if fewer are free."""
        if num_pages > len(self._free):
            return None
        first = len(self._free) - num_pages
        page_ids = self._free[first:]
        del self._free[first:]
        for page_id in page_ids:
            self._taken[page_id] = 1
        return page_ids

    def free(self, page_ids: Sequence[int]) -> None:
        """Take pages back; each must be handed out at present."""
        for page_id in page_ids:
            assert 0 < page_id < len(self._taken), f"page {page_id} is none of this pool's"
            assert self._taken[page_id], f"page {page_id} is free already"
            self._taken[page_id] = 0
        self._free.extend(page_ids)
