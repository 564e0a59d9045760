"""What requests hold: slots, pages of every cache group, and locks in the prefix tree.

The one place where a request's memory is taken and given back, and where it is known who has any. Knows nothing of
queues and policies.
"""

from collections.abc import Iterator, Sequence

from hornbeam.cache.node import Holder, Node, PrefixListener
from hornbeam.cache.pages import PADDING_PAGE, PagePool
from hornbeam.cache.prefix import PrefixTree
from hornbeam.cache.sizes import least_beside_chunk, reuse_unit
from hornbeam.config.components import CacheOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError
from hornbeam.core.request import Status
from hornbeam.scheduler.state import RequestState


class Memory:
    """Slots, page pools and the prefix tree of one engine.

    Invariants: of a request's pages, those of the tokens before `state.node.length` belong to the tree and are locked;
    the others are its own. In a windowed group it has the pages from `state.floors[group]` on: of the tree's it holds
    those from token `state.held_from[group]` on, its own ones before the floor are 0, as they went back.

    Raises:
        ConfigError: a cache group is of a kind that is not implemented, or has too few pages.
    """

    def __init__(
        self,
        specs: tuple[CacheSpec, ...],
        num_pages: tuple[int, ...],
        cache: CacheOptions,
        *,
        num_slots: int,
        chunk_size: int,
    ) -> None:
        for spec in specs:
            if spec.kind not in ("full", "window"):
                raise ConfigError(f"cache groups of kind {spec.kind!r} are not supported yet, only 'full' and 'window'")
        self.page_size = page_size = cache.page_size
        if min(num_pages) < 2:
            raise ConfigError(f"the cache has no room for a page of {page_size} tokens; raise --max-total-tokens")
        assert len(specs) == len(num_pages), "one pool per cache group"
        self.unit = reuse_unit(specs, page_size)
        self.num_slots = num_slots
        self._windows = {group: spec.window for group, spec in enumerate(specs) if spec.window is not None}
        # A group that keeps everything limits what a request can hold; a windowed one only how far it gets at a time.
        self._limiting = [group for group in range(len(specs)) if group not in self._windows] or list(self._windows)
        self.max_total_tokens = (min(num_pages[group] for group in self._limiting) - 1) * page_size
        self.chunk_size = max(chunk_size, self.unit)  # a chunk that is not the last ends at a unit's border
        for group, window in self._windows.items():
            self.chunk_size = min(self.chunk_size, self._largest_chunk(window, (num_pages[group] - 1) * page_size))
        self._radix = cache.radix
        self._pools = tuple(PagePool(number) for number in num_pages)
        self._tree = PrefixTree(self._pools, page_size, self.unit, self._windows, cache.eviction_policy)
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self.num_evicted_pages = 0

    def _largest_chunk(self, window: int, num_tokens: int) -> int:
        """That one request can compute in a windowed group of `num_tokens` tokens."""
        least = least_beside_chunk(window, self.unit, self.page_size)
        if num_tokens < least + self.unit and num_tokens < self.max_total_tokens:
            raise ConfigError(
                f"a cache group with a window of {window} tokens needs pages for {least + self.unit} tokens, "
                f"but has {num_tokens}; raise --max-total-tokens"
            )
        return self.chunk_size if num_tokens >= self.max_total_tokens else num_tokens - least

    @property
    def has_windows(self) -> bool:
        """Whether `leave_behind` has anything to do."""
        return bool(self._windows)

    @property
    def num_free_slots(self) -> int:
        """Requests that could start now."""
        return len(self._free_slots)

    @property
    def num_available_tokens(self) -> int:
        """Tokens for which pages are free, or can be freed by eviction, in the groups that limit a request."""
        return min(self._num_available_pages(group) for group in self._limiting) * self.page_size

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the tree that nobody uses at present."""
        return max(self._tree.num_evictable(group) for group in self._limiting) * self.page_size

    def has_room(self, num_left: Sequence[int], reserve: int) -> bool:
        """Whether prompts of which so many tokens are left fit now, and `reserve` tokens beside them."""
        for group in range(len(self._pools)):
            most, to_come = self.max_total_tokens, reserve
            if group in self._windows:  # what is generated pushes out what lies behind the window
                window = self._windows[group] + self.unit + self.page_size
                most = window + self.chunk_size
                to_come = min(reserve, window * (self.num_slots - self.num_free_slots))
            needed = to_come + sum(min(number, most) for number in num_left)
            if needed > self._num_available_pages(group) * self.page_size:
                return False
        return True

    def known_prefix(self, state: RequestState) -> tuple[list[Node], int]:
        """Of a waiting request: the tree's nodes that it could use, in the last of which it may end, and how far."""
        if not self._radix or state.request.namespace not in self._tree:
            return [], 0
        root = self._tree.root(state.request.namespace)
        return self._tree.follow(root, state.tokens, state.reuse_end)

    def attach(self, state: RequestState) -> None:
        """Give a waiting request a slot and the known prefix of its tokens. Undone by `release`."""
        state.slot = self._free_slots.pop()
        state.node = self._tree.root(state.request.namespace)
        state.pages = [[] for _ in self._pools]
        state.floors = [0] * len(self._pools)
        state.held_from = dict.fromkeys(self._windows, 0)
        self._tree.lock(state.node)
        if not state.num_retractions:
            state.num_cached = 0  # of an attempt that had to wait
        self.reuse(state, idle=True)

    def reuse(self, state: RequestState, *, idle: bool) -> None:
        """Take over what the tree holds of the rest of its prompt by now; at least one token stays to be computed.

        `idle`: no step in flight contains the request.
        """
        node = state.node
        assert node is not None, "not attached"
        # Rows of its own beyond its node are there if the tree has the same ones, without their windows.
        if not self._radix or state.kv_len != node.length or not self._tree.has_child(node, state.tokens):
            return
        match = self._tree.match(node, state.tokens, state.reuse_end)
        if match.length == node.length:
            return
        if idle:
            self.leave_behind(state, match.length)
        for own, found in zip(state.pages, match.pages, strict=True):
            own.extend(found)
        if not state.num_retractions:
            state.num_cached += match.length - node.length
        state.kv_len = state.capacity = match.length
        self._descend(state, match.node)

    def leave_behind(self, state: RequestState, num_done: int) -> None:
        """Give back the pages of windowed groups that nothing after the first `num_done` tokens reads.

        No step in flight reads or writes rows before those tokens.
        """
        node, page_size = state.node, self.page_size
        assert node is not None, "not attached"
        for group, window in self._windows.items():
            # The window of the last whole unit stays, so that the next turn finds it in the tree.
            floor = max(0, num_done - num_done % self.unit - window + 1) // page_size
            before = state.floors[group]
            if floor <= before:
                continue
            state.floors[group] = floor
            begin, own = max(before, node.length // page_size), state.pages[group]
            end = min(floor, len(own))
            if begin < end:
                self._pools[group].free(own[begin:end])
                own[begin:end] = [PADDING_PAGE] * (end - begin)
            if state.held_from[group] < node.length:
                state.held_from[group] = self._tree.let_go(group, node, state.held_from[group], floor * page_size)

    def grow(self, state: RequestState, num_tokens: int) -> bool:
        """Take pages so that it can hold `num_tokens` tokens; evicts if it must. False: there are not enough."""
        num_pages = -(-num_tokens // self.page_size) - len(state.pages[0])
        if num_pages > 0:
            for group, pool in enumerate(self._pools):
                missing = num_pages - pool.num_free
                if missing > 0:
                    num_evicted = self._tree.evict(missing, group)
                    self.num_evicted_pages += num_evicted
                    if num_evicted < missing:
                        return False
            for own, pool in zip(state.pages, self._pools, strict=True):
                own.extend(pool.allocate(num_pages) or ())
            state.capacity += num_pages * self.page_size
        return True

    def publish(self, state: RequestState, start: int, step_id: int) -> Node | None:
        """Make the whole units from `start` to `kv_len`, written by step `step_id`, matchable. None: nothing to add."""
        node, length = state.node, state.kv_len - state.kv_len % self.unit
        assert node is not None, "not attached"
        if not self._radix or start != node.length or length <= start or self._tree.has_child(node, state.tokens):
            return None
        first, end = start // self.page_size, length // self.page_size
        leaf = self._tree.extend(node, state.tokens, length, [ids[first:end] for ids in state.pages], step_id)
        self._descend(state, leaf)
        return leaf

    def release(self, state: RequestState) -> None:
        """Take everything back; rows that are valid go into the tree. No step in flight may contain the request."""
        node, page_size = state.node, self.page_size
        assert node is not None, "not attached"
        length = min(state.kv_len, len(state.tokens))
        length -= length % self.unit
        if not self._radix or length < node.length:
            length = node.length
        first, end = node.length // page_size, length // page_size
        if first < end:
            self._tree.insert(node, state.tokens, length, [ids[first:end] for ids in state.pages])
        for pool, ids in zip(self._pools, state.pages, strict=True):
            pool.free([page for page in ids[end:] if page != PADDING_PAGE])
        for group, begin in state.held_from.items():
            self._tree.let_go(group, node, begin, node.length)
        self._tree.unlock(node, state.request.priority if state.status is Status.FINISHED else None)
        self._free_slots.append(state.slot)
        state.slot, state.node, state.pages = -1, None, []
        state.kv_len = state.capacity = state.num_granted = 0

    def revoke(self, node: Node) -> None:
        """The step that writes `node` failed: nothing of it may be matched any more."""
        self._tree.revoke(node)

    def listen(self, listener: PrefixListener) -> None:
        """See `PrefixTree.listener`."""
        self._tree.listener = listener

    def flush(self) -> None:
        """Drop the prefix tree; no request may hold anything."""
        self._tree.flush()

    def check(self, holders: list[RequestState]) -> None:
        """Verify that `holders` and the tree hold everything that is taken. Raises AssertionError."""
        nodes = {state: state.node for state in holders if state.node is not None}
        assert len(nodes) == len(holders), "a request runs without memory"
        self._tree.check([Holder(node, state.held_from) for state, node in nodes.items()])
        slots = sorted(self._free_slots + [state.slot for state in holders])
        assert slots == list(range(self.num_slots)), f"slots are lost or held twice: {slots}"
        for group, pool in enumerate(self._pools):
            own = []
            for state, node in nodes.items():
                first = max(node.length // self.page_size, state.floors[group])
                assert PADDING_PAGE not in state.pages[group][first:], f"group {group}: a page of the window is gone"
                own += state.pages[group][first:]
            assert len(set(own)) == len(own), f"group {group}: a page belongs to two requests"
            held = len(own) + self._tree.num_pages(group)
            assert pool.num_taken == held, f"group {group}: {pool.num_taken} pages taken, {held} held"

    def _num_available_pages(self, group: int) -> int:
        return self._pools[group].num_free + self._tree.num_evictable(group)

    def _descend(self, state: RequestState, node: Node) -> None:
        """Move a request's lock down to `node`, and hold the windows on the way."""
        above = state.node
        assert above is not None, "not attached"
        self._tree.lock(node, above=above)
        for group in self._windows:
            begin = self._tree.hold(group, node, above, state.floors[group] * self.page_size)
            if state.held_from[group] >= above.length:
                state.held_from[group] = begin
        state.node = node


class Running:
    """The requests that have memory. Those that run are in exactly one of three sets, each in the order they came in.

    One that leaves while steps in flight may still write to its pages keeps them until those steps have been applied.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.prefilling: dict[RequestState, None] = {}
        self.decoding: dict[RequestState, None] = {}
        self.ending: dict[RequestState, None] = {}  # their last step is planned
        self.leaving: dict[RequestState, None] = {}  # finished or retracted; a step in flight contains them
        self.applied = -1  # the last step whose result was applied

    def __len__(self) -> int:
        """Requests that run."""
        return len(self.prefilling) + len(self.decoding) + len(self.ending)

    def __iter__(self) -> Iterator[RequestState]:
        yield from self.decoding
        yield from self.prefilling
        yield from self.ending

    @property
    def retractable(self) -> list[RequestState]:
        """Those that run and have more to do than what is planned."""
        return [*self.decoding, *self.prefilling]

    def place(self, state: RequestState) -> None:
        """Put a request, of which a chunk was just planned, where it belongs; one with more to come keeps its place."""
        if state.kv_len < state.prefill_end:
            self.prefilling[state] = None
        else:
            self.prefilling.pop(state, None)
            (self.decoding if state.kv_len < state.last_kv_len else self.ending)[state] = None

    def leave(self, state: RequestState) -> None:
        """It does not run any more, if it did: give its memory back, now or when steps in flight allow it."""
        for phase in (self.decoding, self.prefilling, self.ending):
            phase.pop(state, None)
        if state.last_step > self.applied:
            self.leaving[state] = None
        elif state.node is not None and state not in self.leaving:
            self._memory.release(state)

    def release_left(self) -> None:
        """Give back what no step in flight writes to any more."""
        for state in [state for state in self.leaving if state.last_step <= self.applied]:
            del self.leaving[state]
            self._memory.release(state)
