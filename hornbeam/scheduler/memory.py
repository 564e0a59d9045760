"""What requests hold: slots, pages of every cache group, and locks in the prefix tree.

The one place where a request's memory is taken and given back. Knows nothing of queues and order.
"""

import math

from hornbeam.cache.pages import PagePool
from hornbeam.cache.prefix import Node, PrefixTree
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError
from hornbeam.scheduler.state import RequestState


class Memory:
    """Slots, page pools and the prefix tree of one engine.

    Invariant: of a request's pages, those of the tokens before `state.node.length` belong to the tree and are
    locked; the others are its own. While its prompt is being computed with the tree on, `kv_len == node.length`.

    Raises:
        ConfigError: a cache group is of a kind that is not implemented, or has no page beside the padding page.
    """

    def __init__(
        self, specs: tuple[CacheSpec, ...], num_pages: tuple[int, ...], page_size: int, num_slots: int, radix: bool
    ) -> None:
        for spec in specs:
            if spec.kind != "full":
                raise ConfigError(f"cache groups of kind {spec.kind!r} are not supported yet; only 'full' ones are")
        if min(num_pages) < 2:
            raise ConfigError(f"the cache has no room for a page of {page_size} tokens; raise --max-total-tokens")
        assert len(specs) == len(num_pages), "one pool per cache group"
        self.page_size = page_size
        self.unit = math.lcm(page_size, *(spec.reuse_granularity for spec in specs))
        self.num_slots = num_slots
        self.max_total_tokens = (min(num_pages) - 1) * page_size
        self._radix = radix
        self._pools = tuple(PagePool(number) for number in num_pages)
        self._tree = PrefixTree(self._pools, page_size, self.unit)
        self._free_slots = list(range(num_slots - 1, -1, -1))

    @property
    def num_free_slots(self) -> int:
        """Requests that could start now."""
        return len(self._free_slots)

    @property
    def num_available_tokens(self) -> int:
        """Tokens for which pages are free, or can be freed by eviction."""
        return (min(pool.num_free for pool in self._pools) + self._tree.num_evictable) * self.page_size

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the tree that nobody uses at present."""
        return self._tree.num_evictable * self.page_size

    def attach(self, state: RequestState) -> None:
        """Give a waiting request a slot and the known prefix of its tokens. Undone by `release`."""
        state.slot = self._free_slots.pop()
        state.node = self._tree.root(state.request.namespace)
        state.pages = [[] for _ in self._pools]
        self._tree.lock(state.node)
        if not state.num_retractions:
            state.num_cached = 0  # of an attempt that had to wait
        self.reuse(state)

    def reuse(self, state: RequestState) -> None:
        """Take over what the tree holds of the rest of its prompt by now; at least one token stays to be computed."""
        node = state.node
        assert node is not None, "not attached"
        if not self._radix or not self._tree.has_child(node, state.tokens):
            return
        match = self._tree.match(node, state.tokens, state.prefill_end - 1)
        self._tree.lock(match.node, above=node)
        state.node = match.node
        for own, found in zip(state.pages, match.pages, strict=True):
            own.extend(found)
        if not state.num_retractions:
            state.num_cached += match.length - node.length
        state.kv_len = state.capacity = match.length

    def grow(self, state: RequestState, num_tokens: int) -> bool:
        """Take pages so that it can hold `num_tokens` tokens; evicts if it must. False: there are not enough."""
        num_pages = -(-num_tokens // self.page_size) - len(state.pages[0])
        if num_pages > 0:
            num_free = min(pool.num_free for pool in self._pools)
            if num_free < num_pages and num_free + self._tree.evict(num_pages - num_free) < num_pages:
                return False
            for own, pool in zip(state.pages, self._pools, strict=True):
                own.extend(pool.allocate(num_pages) or ())
            state.capacity += num_pages * self.page_size
        return True

    def publish(self, state: RequestState, step_id: int) -> Node | None:
        """Make its whole units up to `kv_len`, which step `step_id` completes, matchable. None: nothing to add."""
        node, length = state.node, state.kv_len - state.kv_len % self.unit
        assert node is not None, "not attached"
        if not self._radix or length <= node.length or self._tree.has_child(node, state.tokens):
            return None
        first, end = node.length // self.page_size, length // self.page_size
        leaf = self._tree.extend(node, state.tokens, length, [ids[first:end] for ids in state.pages], step_id)
        self._tree.lock(leaf, above=node)
        state.node = leaf
        return leaf

    def release(self, state: RequestState) -> None:
        """Take everything back; rows that are valid go into the tree. No step in flight may contain the request."""
        node, page_size = state.node, self.page_size
        assert node is not None, "not attached"
        own = [ids[node.length // page_size :] for ids in state.pages]
        length = min(state.kv_len, len(state.tokens))
        length -= length % self.unit
        if self._radix and length > node.length:
            match = self._tree.match(node, state.tokens, length)
            first, end = (match.length - node.length) // page_size, (length - node.length) // page_size
            if first < end:
                self._tree.extend(match.node, state.tokens, length, [ids[first:end] for ids in own])
            own = [ids[:first] + ids[end:] for ids in own]
        for pool, ids in zip(self._pools, own, strict=True):
            pool.free(ids)
        self._tree.unlock(node)
        self._free_slots.append(state.slot)
        state.slot, state.node, state.pages = -1, None, []
        state.kv_len = state.capacity = state.num_granted = 0

    def revoke(self, node: Node) -> None:
        """The step that writes `node` failed: nothing of it may be matched any more."""
        self._tree.revoke(node)

    def flush(self) -> None:
        """Drop the prefix tree; no request may hold anything."""
        self._tree.flush()

    def check(self, holders: list[RequestState]) -> None:
        """Verify that `holders` and the tree hold everything that is taken. Raises AssertionError."""
        nodes = {state: state.node for state in holders if state.node is not None}
        assert len(nodes) == len(holders), "a request runs without memory"
        self._tree.check(list(nodes.values()))
        slots = sorted(self._free_slots + [state.slot for state in holders])
        assert slots == list(range(self.num_slots)), f"slots are lost or held twice: {slots}"
        for group, pool in enumerate(self._pools):
            own = [
                page for state, node in nodes.items() for page in state.pages[group][node.length // self.page_size :]
            ]
            assert len(set(own)) == len(own), f"group {group}: a page belongs to two requests"
            held = len(own) + self._tree.num_pages
            assert pool.num_taken == held, f"group {group}: {pool.num_taken} pages taken, {held} held"
