"""Which pages of a cache group are free, which of the prefix tree's nobody uses, and which of those go first.

Knows nothing of keys, and not what a page holds. Page 0 is never handed out: padded rows of a step read and write it.
"""

import heapq
from collections.abc import Callable, Collection, Sequence

from hornbeam.cache.node import Node

PADDING_PAGE = 0

Order = Callable[[Node], tuple[int, int]]

# What is evicted first has the smallest key. slru: what was used once goes before all that was used again.
EVICTION_ORDERS: dict[str, Order] = {
    "lru": lambda node: (0, node.used_at),
    "lfu": lambda node: (node.num_uses, node.used_at),
    "slru": lambda node: (min(node.num_uses, 2), node.used_at),
    "priority": lambda node: (node.priority, node.used_at),
}


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


class PageAccounts:
    """What the nodes of a prefix tree hold, per group, and what of it could be evicted.

    In a group that keeps everything these are the pages of nodes that nobody locks; in a windowed group (`windows`
    lists them) of those that nobody holds as part of a window.
    """

    def __init__(self, pools: Sequence[PagePool], page_size: int, windows: Collection[int]) -> None:
        self._pools = tuple(pools)
        self._page_size = page_size
        self._idle: dict[int, dict[Node, None]] = {group: {} for group in windows}  # held by nobody, oldest first
        self.num_pages = [0] * len(self._pools)  # per group, of all nodes; revoked ones with locks included
        self.num_evictable = [0] * len(self._pools)

    def add(self, node: Node) -> None:
        """A node that nobody uses yet has come, with its pages."""
        for group, ids in enumerate(node.pages):
            windowed = group in self._idle
            assert len(ids) * self._page_size == len(node.key) or (windowed and not ids), "pages and tokens"
            self.num_pages[group] += len(ids)
            if windowed:
                self.let_go(group, node)
            else:
                self.num_evictable[group] += len(ids)

    def fill(self, group: int, node: Node, page_ids: list[int]) -> None:
        """A tombstone gets its pages back."""
        node.pages[group] = page_ids
        self.num_pages[group] += len(page_ids)
        if not node.holds[group]:
            self.let_go(group, node)

    def split(self, node: Node, upper: Node) -> None:
        """`upper` has taken over a part of what `node` has."""
        for idle in self._idle.values():
            if node in idle:
                idle[upper] = None

    def lock(self, node: Node) -> None:
        """The first lock has come."""
        self._count(node, -1)

    def unlock(self, node: Node) -> None:
        """The last lock has gone."""
        self._count(node, 1)

    def hold(self, group: int, node: Node) -> None:
        """The node's pages in a windowed group are needed."""
        if node in self._idle[group]:
            del self._idle[group][node]
            self.num_evictable[group] -= len(node.pages[group])

    def let_go(self, group: int, node: Node) -> None:
        """The node's pages in a windowed group, if it has any, can be evicted from now on."""
        if node.pages[group]:
            self._idle[group][node] = None
            self.num_evictable[group] += len(node.pages[group])

    def first_idle(self, group: int) -> Node | None:
        """Whose pages in a windowed group have not been needed for longest."""
        return next(iter(self._idle[group]), None)

    def remove(self, node: Node) -> None:
        """The node can be matched no more; its pages go back now, or with its last lock (see `free`)."""
        for group in self._idle:
            self.hold(group, node)
        if not node.num_locks:
            self._count(node, -1)
            self.free(node)

    def free(self, node: Node) -> None:
        """Give the pages back to the pools."""
        for group, ids in enumerate(node.pages):
            self.num_pages[group] -= len(ids)
            self._pools[group].free(ids)
        node.pages = [[] for _ in self._pools]

    def free_window(self, group: int, node: Node) -> None:
        """Give back the pages of one windowed group, which nobody holds."""
        self.hold(group, node)
        self.num_pages[group] -= len(node.pages[group])
        self._pools[group].free(node.pages[group])
        node.pages[group] = []

    def _count(self, node: Node, sign: int) -> None:
        for group, ids in enumerate(node.pages):
            if group not in self._idle:
                self.num_evictable[group] += sign * len(ids)


class LeafQueue:
    """Leaves by eviction order. Entries are checked when their turn comes, so use costs nothing while it goes on."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._heap: list[tuple[tuple[int, int], int, Node]] = []  # (key, tie breaker, node)
        self._num_pushed = 0
        self._num_dead = 0  # entries of nodes that are out of the tree

    def push(self, node: Node) -> None:
        """`node` can be evicted, if it is a leaf."""
        if not node.queued and not node.children and node.parent is not None:
            node.queued = True
            self._num_pushed += 1
            heapq.heappush(self._heap, (self._order(node), self._num_pushed, node))

    def pop(self) -> Node | None:
        """The unlocked leaf that goes first, None if there is none."""
        while self._heap:
            key, _, node = heapq.heappop(self._heap)
            node.queued = False
            if node.parent is None:
                self._num_dead -= 1
            elif node.num_locks or node.children or node.revoked:
                pass  # comes back when it is an unlocked leaf again
            elif self._order(node) != key:
                self.push(node)  # used since it was queued
            else:
                return node
        return None

    def discard(self, node: Node) -> None:
        """`node`, now without a parent, has left the tree."""
        self._num_dead += node.queued
        if self._num_dead > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[2].parent is not None]
            heapq.heapify(self._heap)
            self._num_dead = 0

    def clear(self) -> None:
        """The tree is empty."""
        self._heap.clear()
        self._num_dead = 0
