"""The radix tree of reusable prefixes: token ids to pages, locks, and eviction of what is not in use.

A node stands for a stretch of tokens and owns one list of pages per cache group. All borders lie at multiples of
`unit` tokens (the page size, and what the groups demand of a hit): children are found by their first unit, and two
nodes never share a page. Requests lock the path of the node they use; a node that nobody locks can be evicted, leaves
first. Knows no requests, and of steps only the number of the one that writes a node.

A windowed group reads only the last rows before a token, so its pages may be missing in a node (a tombstone), inside
the tree too. A hit is valid where every windowed group has the whole window before it. Besides the lock of its path a
request holds, per windowed group, the nodes of its window: what nobody holds can be evicted from that group alone.
"""

from collections.abc import Sequence

from hornbeam.cache.audit import check_nodes
from hornbeam.cache.node import WRITTEN, Holder, Match, Node, PrefixListener, common_length, nodes_below
from hornbeam.cache.pages import EVICTION_ORDERS, PADDING_PAGE, LeafQueue, PageAccounts, PagePool


class PrefixTree:
    """Prefixes in namespaces, over the pages of `pools` (one per cache group).

    Args:
        pools: one per cache group; evicted pages go back to them.
        page_size: tokens per page, in every group.
        unit: tokens that a hit must be a multiple of; itself a multiple of `page_size`.
        windows: of the windowed groups: how many rows a token reads, its own included.
        policy: a key of `EVICTION_ORDERS`. Windows alone go in the order in which they were last held.
    """

    def __init__(
        self,
        pools: Sequence[PagePool],
        page_size: int,
        unit: int,
        windows: dict[int, int] | None = None,
        policy: str = "lru",
    ) -> None:
        assert unit % page_size == 0, "nodes end at page borders"
        self._pools = tuple(pools)
        self._page_size = page_size
        self._unit = unit
        self._windows = windows or {}
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._leaves = LeafQueue(EVICTION_ORDERS[policy])
        self.listener: PrefixListener | None = None  # hears what comes and goes
        self._accounts = PageAccounts(self._pools, page_size, self._windows)

    def num_pages(self, group: int = 0) -> int:
        """Pages of all nodes, revoked ones with locks included."""
        return self._accounts.num_pages[group]

    def num_evictable(self, group: int = 0) -> int:
        """Pages of the nodes without a lock; in a windowed group, of those that nobody holds."""
        return self._accounts.num_evictable[group]

    def __contains__(self, namespace: str) -> bool:
        return namespace in self._roots

    def root(self, namespace: str) -> Node:
        """The empty prefix of a namespace. Lock it if it is to be kept."""
        root = self._roots.get(namespace)
        if root is None:
            groups = range(len(self._pools))
            root = Node(
                parent=None,
                key=[],
                pages=[[] for _ in groups],
                length=0,
                holds=[0 for _ in groups],
                namespace=namespace,
            )
            self._roots[namespace] = root
        return root

    def match(self, start: Node, tokens: list[int], limit: int) -> Match:
        """Follow `tokens` (a whole sequence; `start` is on its path) down from `start`, up to `limit` tokens.

        Whoever asks has the windows before `start`. Splits the node in which the match ends, so that the result's
        node can be locked.
        """
        self._clock += 1
        path, length = self.follow(start, tokens, limit)
        if path and path[-1].length > length:
            path[-1] = self._split(path[-1], length - path[-1].start)
        pages: tuple[list[int], ...] = tuple([] for _ in self._pools)
        for node in path:
            node.used_at = self._clock
        for group, found in enumerate(pages):
            for node in path:
                found.extend(node.pages[group] or [PADDING_PAGE] * (len(node.key) // self._page_size))
        return Match(node=path[-1] if path else start, length=length, pages=pages)

    def follow(self, start: Node, tokens: list[int], limit: int) -> tuple[list[Node], int]:
        """What `match` would find, and nothing changes: the nodes, in the last of which it may end, and the length."""
        node, position, length, unit = start, start.length, start.length, self._unit
        known = dict.fromkeys(self._windows, 0)  # per windowed group: from where on it has every row up to `position`
        path: list[Node] = []
        num_valid = 0
        while position + unit <= limit:
            child = node.children.get(tuple(tokens[position : position + unit]))
            if child is None:
                break
            node = child
            num_key = len(child.key)
            common = num_key if num_key == unit else common_length(child.key, tokens, position, limit, unit)
            position += common
            path.append(child)
            for group in known:
                if not child.pages[group]:
                    known[group] = position
            if not known or all(
                position - self._windows[group] + 1 >= first for group, first in known.items() if first
            ):
                num_valid, length = len(path), position
            if common < num_key:
                break
        return path[:num_valid], length

    def extend(
        self, node: Node, tokens: list[int], length: int, pages: Sequence[list[int]], step_id: int = WRITTEN
    ) -> Node:
        """Add `tokens[node.length:length]` below `node` and take over `pages` (per group). Returns the new leaf.

        There must be no such child yet.
        """
        key = tokens[node.length : length]
        first = tuple(key[: self._unit])
        assert len(first) == self._unit, "nothing to add"
        assert len(key) % self._unit == 0, f"{len(key)} tokens are not whole units of {self._unit}"
        assert first not in node.children, "the tree holds this prefix already"
        self._clock += 1
        leaf = Node(
            parent=node,
            key=key,
            pages=list(pages),
            length=length,
            holds=[0] * len(self._pools),
            step_id=step_id,
            used_at=self._clock,
        )
        node.children[first] = leaf
        self._accounts.add(leaf)
        self._leaves.push(leaf)
        if self.listener is not None:
            self.listener.stored(leaf)
        return leaf

    def insert(self, start: Node, tokens: list[int], length: int, pages: Sequence[list[int]]) -> None:
        """Keep the rows `start.length .. length`, which are complete, and take over their pages.

        Pages that the tree does not need, because it has such rows already, go back to the pools.

        Args:
            start: locked, or a root.
            tokens: the whole sequence.
            length: a multiple of the unit.
            pages: per group; a windowed one may begin with zeros, for pages that are gone.
        """
        # Where a windowed group's pages begin, nodes are cut, so that each node has all or none of them.
        cuts = sorted({*(self._first_whole(pages[group], start.length) for group in self._windows), length})
        node, position = start, start.length
        while position < length:
            end = next(cut for cut in cuts if cut > position)
            child = node.children.get(tuple(tokens[position : position + self._unit]))
            if child is not None:
                common = common_length(
                    child.key, tokens, position, length if all(child.pages) else min(end, length), self._unit
                )
                end = position + common
                child = child if common == len(child.key) else self._split(child, common)
            cut = slice((position - start.length) // self._page_size, (end - start.length) // self._page_size)
            parts = [ids[cut] for ids in pages]
            if child is None:
                kept = [ids if ids[0] != PADDING_PAGE else [] for ids in parts]
                child = self.extend(node, tokens, end, kept)
                parts = [[] if kept_ids else ids for kept_ids, ids in zip(kept, parts, strict=True)]
            for group, ids in enumerate(parts):
                if ids and not child.pages[group] and ids[0] != PADDING_PAGE:
                    self._accounts.fill(group, child, ids)
                else:
                    self._pools[group].free([page for page in ids if page != PADDING_PAGE])
            node, position = child, end
        self._settle(node)

    def has_child(self, node: Node, tokens: list[int]) -> bool:
        """Whether the tree knows at least one unit more of `tokens` than `node`."""
        return tuple(tokens[node.length : node.length + self._unit]) in node.children

    def lock(self, node: Node, above: Node | None = None) -> None:
        """Keep `node` and its ancestors. With `above`: the holder has locked that ancestor; its lock moves down."""
        walk: Node | None = node
        while walk is not above:
            assert walk is not None, "`above` is an ancestor"
            if walk.num_locks == 0:
                self._accounts.lock(walk)
            walk.num_locks += 1
            walk = walk.parent

    def unlock(self, node: Node, priority: int | None = None) -> None:
        """Give one lock of `node` and of its ancestors back. `priority`: of the request that has ended with it."""
        self._clock += 1
        walk: Node | None = node
        while walk is not None:
            assert walk.num_locks > 0, "a lock is given back twice"
            parent = walk.parent
            walk.num_locks -= 1
            walk.used_at = self._clock
            if priority is not None:
                walk.num_uses += 1
                walk.priority = max(walk.priority, priority)
            if walk.num_locks == 0:
                if walk.revoked:
                    self._accounts.free(walk)
                else:
                    self._accounts.unlock(walk)
                    self._settle(walk)
            walk = parent

    def hold(self, group: int, node: Node, above: Node, first: int) -> int:
        """Keep the windowed `group`'s pages of the nodes between `above` and `node` that reach beyond row `first`.

        Returns where the uppermost of them begins (`node.length` if there is none): what `let_go` wants to know.
        """
        begin, walk = node.length, node
        while walk is not above and walk.length > first:
            self._cut_behind(group, walk, first)
            self._accounts.hold(group, walk)
            walk.holds[group] += 1
            begin = walk.start
            assert walk.parent is not None, "`above` is an ancestor"
            walk = walk.parent
            if begin <= first:
                break
        return begin

    def let_go(self, group: int, node: Node, begin: int, first: int) -> int:
        """Of the path of `node` that is held from `begin` on, give back the nodes that end at or before row `first`.

        Returns the new begin.
        """
        walk: Node | None = node
        held_from = begin
        while walk is not None and walk.start >= begin and walk.parent is not None:
            self._cut_behind(group, walk, first)
            if walk.length <= first:
                assert walk.holds[group] > 0, "a window is given back twice"
                held_from = max(held_from, walk.length)
                walk.holds[group] -= 1
                if walk.holds[group] == 0 and not walk.revoked:
                    self._accounts.let_go(group, walk)
            walk = walk.parent
        return held_from

    def evict(self, num_pages: int, group: int = 0) -> int:
        """Free at least `num_pages` pages of `group`, if so many are not in use. Returns how many it freed."""
        num_pages_held = self._accounts.num_pages
        before = num_pages_held[group]
        while before - num_pages_held[group] < num_pages:
            node = self._accounts.first_idle(group) if group in self._windows else self._leaves.pop()
            if node is None:
                break
            if group in self._windows:
                self._accounts.free_window(group, node)
                self._settle(node)
            else:
                self._settle(self._unlink(node))
        return before - num_pages_held[group]

    def revoke(self, node: Node) -> None:
        """Take out what the step that writes `node` has added here, with everything below: the rows are not valid.

        Pages without a lock are freed now, the others with their last lock.
        """
        if node.revoked:
            return
        while node.parent is not None and node.parent.step_id == node.step_id:
            node = node.parent  # parts of the same stretch, split since
        below = list(nodes_below(node))
        self._tell_removed(below)
        for gone in below:
            gone.revoked = True
            self._accounts.remove(gone)
        assert node.parent is not None, "a root is never revoked"
        del node.parent.children[tuple(node.key[: self._unit])]
        self._settle(node.parent)

    def flush(self) -> None:
        """Drop every prefix. Nothing may be locked."""
        for root in list(self._roots.values()):
            below = list(nodes_below(root))
            self._tell_removed(below[1:])
            for node in below:
                assert node.num_locks == 0, f"tokens up to {node.length} are locked {node.num_locks} times"
                self._accounts.remove(node)
        self._roots.clear()
        self._leaves.clear()

    def check(self, holders: Sequence[Holder]) -> None:
        """Verify the structure, and every count given the locks. Raises AssertionError."""
        check_nodes(
            {node for root in self._roots.values() for node in nodes_below(root)},
            holders,
            unit=self._unit,
            page_size=self._page_size,
            windows=self._windows.keys(),
            num_pages=self._accounts.num_pages,
            num_evictable=self._accounts.num_evictable,
        )

    def _tell_removed(self, nodes: Sequence[Node]) -> None:
        """`nodes`: parents first."""
        if self.listener is not None:
            for node in reversed(nodes):
                self.listener.removed(node)

    def _first_whole(self, page_ids: list[int], begin: int) -> int:
        """The first unit border from which on no page is missing; `page_ids` starts at token `begin`."""
        num_gone = next((index for index, page in enumerate(page_ids) if page != PADDING_PAGE), len(page_ids))
        return begin - (-num_gone * self._page_size // self._unit) * self._unit

    def _split(self, node: Node, length: int) -> Node:
        """Cut `node` after `length` tokens; the new upper part is returned, `node` keeps the lower and its holders."""
        parent, num_pages = node.parent, length // self._page_size
        assert parent is not None, "the root has no tokens to split"
        upper = Node(
            parent=parent,
            key=node.key[:length],
            pages=[ids[:num_pages] for ids in node.pages],
            length=node.start + length,
            holds=list(node.holds),
            step_id=node.step_id,
            num_locks=node.num_locks,
            used_at=node.used_at,
            num_uses=node.num_uses,
            priority=node.priority,
            revoked=node.revoked,
        )
        if not node.revoked:
            parent.children[tuple(upper.key[: self._unit])] = upper
        node.parent, node.key = upper, node.key[length:]
        node.pages = [ids[num_pages:] for ids in node.pages]
        upper.children[tuple(node.key[: self._unit])] = node
        self._accounts.split(node, upper)
        return upper

    def _cut_behind(self, group: int, node: Node, first: int) -> None:
        """Split off what `node` has before row `first`, if that is at least a window: so little is held in vain."""
        behind = (first - node.start) // self._unit * self._unit
        if max(self._windows[group], self._unit) <= behind < len(node.key):
            self._split(node, behind)

    def _settle(self, node: Node) -> None:
        """If nobody uses this leaf: it can be evicted, and is if no match could end there. Then its parent is one."""
        while not node.num_locks and not node.children:
            if node.parent is None:
                self._roots.pop(node.namespace, None)  # forget a namespace that nothing is left of
                return
            if all(node.pages):
                self._leaves.push(node)
                return
            node = self._unlink(node)

    def _unlink(self, node: Node) -> Node:
        """Evict an unlocked leaf; returns its parent."""
        parent = node.parent
        assert parent is not None, "a root has no pages"
        self._tell_removed([node])
        self._accounts.remove(node)
        del parent.children[tuple(node.key[: self._unit])]
        node.parent = None
        self._leaves.discard(node)
        return parent
