"""The radix tree of reusable prefixes: token ids to pages, locks, and eviction of what is not in use.

A node stands for a stretch of tokens and owns one list of pages per cache group. All borders lie at multiples of
`unit` tokens (the page size, and what the groups demand of a hit): children are found by their first unit, and two
nodes never share a page. Requests lock the path of the node they use; a node that nobody locks can be evicted, leaves
first, the least recently used one first. Knows no requests, and of steps only the number of the one that writes a node.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hornbeam.cache.pages import PagePool

WRITTEN = -1  # `step_id` of a node whose rows were complete when it was added


@dataclass(slots=True, eq=False)
class Node:
    """The tokens `length - len(key) .. length` of a prefix. Only the tree changes it."""

    parent: "Node | None"
    key: list[int]
    pages: list[list[int]]  # [group][page]
    length: int  # tokens from the root to this node's end
    step_id: int = WRITTEN  # the step that writes the rows
    namespace: str = ""
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)  # by their first unit
    num_locks: int = 0
    used_at: int = 0
    queued: bool = False  # has its entry in the eviction queue
    revoked: bool = False  # out of the tree: its pages go back with its last lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The longest known prefix below a start node."""

    node: Node
    length: int  # tokens from the root
    pages: tuple[list[int], ...]  # per group, of the tokens between start node and `length`


class PrefixTree:
    """Prefixes in namespaces, over the pages of `pools` (one per cache group).

    Args:
        pools: one per cache group; evicted pages go back to them.
        page_size: tokens per page, in every group.
        unit: tokens that a hit must be a multiple of; itself a multiple of `page_size`.
    """

    def __init__(self, pools: Sequence[PagePool], page_size: int, unit: int) -> None:
        assert unit % page_size == 0, "nodes end at page borders"
        self._pools = tuple(pools)
        self._page_size = page_size
        self._unit = unit
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._queue: list[tuple[int, int, Node]] = []  # evictable leaves: (used_at, tie breaker, node), lazily updated
        self._num_queued = 0
        self.num_pages = 0  # per group, of all nodes, revoked ones with locks included
        self.num_evictable = 0  # per group, of the nodes without a lock

    def root(self, namespace: str) -> Node:
        """The empty prefix of a namespace. Lock it if it is to be kept."""
        root = self._roots.get(namespace)
        if root is None:
            root = Node(parent=None, key=[], pages=[[] for _ in self._pools], length=0, namespace=namespace)
            self._roots[namespace] = root
        return root

    def match(self, start: Node, tokens: list[int], limit: int) -> Match:
        """Follow `tokens` (a whole sequence; `start` is on its path) down from `start`, up to `limit` tokens.

        Splits the node in which the match ends, so that the result's node can be locked.
        """
        self._clock += 1
        node, position, unit = start, start.length, self._unit
        pages: tuple[list[int], ...] = tuple([] for _ in self._pools)
        while position + unit <= limit:
            child = node.children.get(tuple(tokens[position : position + unit]))
            if child is None:
                break
            common = self._common_length(child.key, tokens, position, limit)
            node = child if common == len(child.key) else self._split(child, common)
            node.used_at = self._clock
            position += common
            for group, ids in zip(pages, node.pages, strict=True):
                group.extend(ids)
            if node is not child:
                break
        return Match(node=node, length=position, pages=pages)

    def extend(
        self, node: Node, tokens: list[int], length: int, pages: Sequence[list[int]], step_id: int = WRITTEN
    ) -> Node:
        """Add `tokens[node.length:length]` below `node` and take over `pages` (per group). Returns the new leaf.

        There must be no such child yet: `node` is where a match of the same tokens ended.
        """
        key = tokens[node.length : length]
        first = tuple(key[: self._unit])
        assert len(first) == self._unit, "nothing to add"
        assert len(key) % self._unit == 0, f"{len(key)} tokens are not whole units of {self._unit}"
        assert first not in node.children, "the tree holds this prefix already"
        assert all(len(ids) * self._page_size == len(key) for ids in pages), "pages and tokens differ"
        self._clock += 1
        leaf = Node(parent=node, key=key, pages=list(pages), length=length, step_id=step_id, used_at=self._clock)
        node.children[first] = leaf
        self.num_pages += len(leaf.pages[0])
        self.num_evictable += len(leaf.pages[0])
        self._enqueue(leaf)
        return leaf

    def has_child(self, node: Node, tokens: list[int]) -> bool:
        """Whether the tree knows at least one unit more of `tokens` than `node`."""
        return tuple(tokens[node.length : node.length + self._unit]) in node.children

    def lock(self, node: Node, above: Node | None = None) -> None:
        """Keep `node` and its ancestors. With `above`: the holder has locked that ancestor; its lock moves down."""
        walk: Node | None = node
        while walk is not above:
            assert walk is not None, "`above` is an ancestor"
            if walk.num_locks == 0:
                self.num_evictable -= len(walk.pages[0])
            walk.num_locks += 1
            walk = walk.parent

    def unlock(self, node: Node) -> None:
        """Give one lock of `node` and of its ancestors back."""
        self._clock += 1
        walk: Node | None = node
        while walk is not None:
            assert walk.num_locks > 0, "a lock is given back twice"
            walk.num_locks -= 1
            walk.used_at = self._clock
            if walk.num_locks == 0:
                if walk.revoked:
                    self._free(walk)
                else:
                    self.num_evictable += len(walk.pages[0])
                    self._enqueue(walk)
            parent = walk.parent
            if parent is None:
                self._drop_if_empty(walk)
            walk = parent

    def evict(self, num_pages: int) -> int:
        """Free at least `num_pages` pages per group, if so many are not locked. Returns how many it freed."""
        freed = 0
        while freed < num_pages and self._queue:
            used_at, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.num_locks or node.children or node.revoked:
                continue  # comes back when it is an unlocked leaf again
            if node.used_at != used_at:
                self._enqueue(node)  # used since: it queues again, as of its last use
                continue
            freed += len(node.pages[0])
            self._remove(node)
        return freed

    def revoke(self, node: Node) -> None:
        """Take out what the step that writes `node` has added here, with everything below: the rows are not valid.

        Pages without a lock are freed now, the others with their last lock.
        """
        if node.revoked:
            return
        while node.parent is not None and node.parent.step_id == node.step_id:
            node = node.parent  # parts of the same stretch, split since
        self._detach(node)
        for below in list(_walk(node)):
            below.revoked = True
            if below.num_locks == 0:
                self.num_evictable -= len(below.pages[0])
                self._free(below)

    def flush(self) -> None:
        """Drop every prefix. Nothing may be locked."""
        for root in list(self._roots.values()):
            for node in list(_walk(root)):
                assert node.num_locks == 0, f"tokens up to {node.length} are locked {node.num_locks} times"
                self._free(node)
        self._roots.clear()
        self._queue.clear()
        self.num_evictable = 0

    def check(self, holders: Sequence[Node]) -> None:
        """Verify the structure, and every count given the locked nodes, one entry per lock. Raises AssertionError."""
        locks = Counter(node for holder in holders for node in _path(holder))
        nodes = {node for root in self._roots.values() for node in _walk(root)}
        for node in nodes:
            assert not node.revoked, "a revoked node can be matched"
            assert all(len(ids) * self._page_size == len(node.key) for ids in node.pages), "pages and tokens differ"
            if node.parent is not None:
                assert node.parent.children[tuple(node.key[: self._unit])] is node, "a child stands under a wrong key"
                assert node.length == node.parent.length + len(node.key), "lengths do not add up"
                assert len(node.key) % self._unit == 0, "a node ends inside a unit"
                assert node.queued or node.num_locks or node.children, "a leaf that can never be evicted"
        for node in nodes | locks.keys():
            assert node.num_locks == locks[node], f"{node.num_locks} locks at {node.length} tokens, {locks[node]} held"
        num_pages = sum(len(node.pages[0]) for node in nodes | locks.keys())
        assert num_pages == self.num_pages, f"{num_pages} pages in the tree, {self.num_pages} counted"
        num_evictable = sum(len(node.pages[0]) for node in nodes if not locks[node])
        assert num_evictable == self.num_evictable, f"{num_evictable} evictable pages, {self.num_evictable} counted"

    def _common_length(self, key: list[int], tokens: list[int], position: int, limit: int) -> int:
        """Tokens, in whole units, that `key` and `tokens[position:limit]` share; the first unit is known to match."""
        longest = min(len(key), (limit - position) // self._unit * self._unit)
        if tokens[position : position + longest] == key[:longest]:
            return longest
        low, high = 1, longest // self._unit  # units: `low` are equal, `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            begin, end = low * self._unit, middle * self._unit
            if tokens[position + begin : position + end] == key[begin:end]:
                low = middle
            else:
                high = middle
        return low * self._unit

    def _split(self, node: Node, length: int) -> Node:
        """Cut `node` after `length` tokens; the new upper part is returned, `node` keeps the lower and its holders."""
        parent, num_pages = node.parent, length // self._page_size
        assert parent is not None, "the root has no tokens to split"
        upper = Node(
            parent=parent,
            key=node.key[:length],
            pages=[ids[:num_pages] for ids in node.pages],
            length=node.length - len(node.key) + length,
            step_id=node.step_id,
            num_locks=node.num_locks,
            used_at=node.used_at,
        )
        parent.children[tuple(upper.key[: self._unit])] = upper
        node.parent, node.key = upper, node.key[length:]
        node.pages = [ids[num_pages:] for ids in node.pages]
        upper.children[tuple(node.key[: self._unit])] = node
        return upper

    def _enqueue(self, node: Node) -> None:
        if not node.queued and not node.children and node.parent is not None:
            node.queued = True
            self._num_queued += 1
            heapq.heappush(self._queue, (node.used_at, self._num_queued, node))

    def _remove(self, node: Node) -> None:
        """Evict an unlocked leaf."""
        self.num_evictable -= len(node.pages[0])
        self._free(node)
        self._detach(node)

    def _detach(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None, "a root is dropped, not detached"
        del parent.children[tuple(node.key[: self._unit])]
        if parent.num_locks == 0:
            self._enqueue(parent)
            self._drop_if_empty(parent)

    def _drop_if_empty(self, node: Node) -> None:
        """Forget a namespace that nothing is left of."""
        if node.parent is None and not node.children and node.num_locks == 0:
            self._roots.pop(node.namespace, None)

    def _free(self, node: Node) -> None:
        self.num_pages -= len(node.pages[0])
        for pool, ids in zip(self._pools, node.pages, strict=True):
            pool.free(ids)


def _path(node: Node) -> Iterator[Node]:
    """`node` and its ancestors."""
    walk: Node | None = node
    while walk is not None:
        yield walk
        walk = walk.parent


def _walk(node: Node) -> Iterator[Node]:
    """`node` and everything below, parents first."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
