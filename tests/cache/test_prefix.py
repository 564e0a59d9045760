"""The radix tree against a model that is a plain dictionary of prefixes."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hornbeam.cache.node import Holder, Node, prefix_of
from hornbeam.cache.pages import PagePool
from hornbeam.cache.prefix import PrefixTree

pytestmark = pytest.mark.pure


def add(tree: PrefixTree, pools: list[PagePool], tokens: list[int], page_size: int = 1, step_id: int = -1) -> Node:
    """Insert `tokens` below the default namespace's root."""
    match = tree.match(tree.root(""), tokens, len(tokens))
    if match.length == len(tokens):
        return match.node
    pages = [pool.allocate((len(tokens) - match.length) // page_size) or [] for pool in pools]
    return tree.extend(match.node, tokens, len(tokens), pages, step_id)


def length_of(tree: PrefixTree, tokens: list[int]) -> int:
    return tree.match(tree.root(""), tokens, len(tokens)).length


def tree_of(*prompts: list[int], num_pages: int = 100) -> tuple[PrefixTree, list[PagePool]]:
    pools = [PagePool(num_pages)]
    tree = PrefixTree(pools, 1, 1)
    for prompt in prompts:
        add(tree, pools, prompt)
    return tree, pools


def test_a_match_ends_at_whole_units_and_at_the_limit() -> None:
    pools = [PagePool(50), PagePool(60)]
    tree = PrefixTree(pools, 2, 6)
    tokens = list(range(24))
    add(tree, pools, tokens, page_size=2)
    assert length_of(tree, tokens[:17] + [99] * 9) == 12
    match = tree.match(tree.root(""), tokens, 23)
    assert match.length == 18
    assert [len(ids) for ids in match.pages] == [9, 9]
    assert match.node.length == 18
    below = tree.match(match.node, tokens, 24)
    assert (below.length, [len(ids) for ids in below.pages]) == (24, [3, 3])
    tree.check([])


def test_namespaces_share_nothing_and_vanish_when_empty() -> None:
    tree, pools = tree_of([1, 2, 3])
    assert tree.match(tree.root("other"), [1, 2, 3], 3).length == 0
    root = tree.root("other")
    tree.lock(root)
    tree.unlock(root)
    assert tree.root("other") is not root
    assert tree.evict(9) == 3
    assert pools[0].num_taken == 0


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree, _ = tree_of([1, 1], [2, 2], [3, 3])
    assert length_of(tree, [1, 1]) == 2  # used now
    assert tree.evict(1) == 2
    assert [length_of(tree, [first, first]) for first in (1, 2, 3)] == [2, 0, 2]


@pytest.mark.parametrize(
    ("policy", "order"), [("lru", "abcd"), ("lfu", "dacb"), ("slru", "dabc"), ("priority", "bdac")]
)
def test_eviction_policies(policy: str, order: str) -> None:
    pools = [PagePool(9)]
    tree = PrefixTree(pools, 1, 1, policy=policy)
    prompts = {name: [index] for index, name in enumerate("abcd")}
    uses = {"a": (2, 3), "b": (4, 1), "c": (3, 4), "d": (1, 2)}  # how often, with which priority
    for name, (number, priority) in uses.items():
        node = add(tree, pools, prompts[name])
        for _ in range(number):
            tree.lock(node)
            tree.unlock(node, priority)
    gone = ""
    while tree.evict(1):
        gone += "".join(name for name in "abcd" if name not in gone and not length_of(tree, prompts[name]))
    assert gone == order


def test_giving_a_lock_back_counts_as_use() -> None:
    tree, pools = tree_of()
    node = add(tree, pools, [1, 1])
    tree.lock(node)
    add(tree, pools, [2, 2])
    tree.unlock(node)
    tree.evict(1)
    assert [length_of(tree, [first, first]) for first in (1, 2)] == [2, 0]


def test_parents_become_leaves_and_locks_protect_their_path() -> None:
    tree, _ = tree_of([1, 2, 3, 4], [1, 2, 5, 6])
    match = tree.match(tree.root(""), [1, 2, 3, 9], 4)
    assert match.length == 3
    tree.lock(match.node)
    assert (tree.num_pages(), tree.num_evictable()) == (6, 3)
    assert tree.evict(100) == 3
    assert length_of(tree, [1, 2, 3, 4]) == 3
    with pytest.raises(AssertionError, match="locked"):
        tree.flush()
    tree.unlock(match.node)
    assert tree.evict(100) == 3
    assert tree.num_pages() == 0
    tree.check([])


def test_a_split_node_keeps_its_holders() -> None:
    tree, pools = tree_of()
    node = add(tree, pools, [1, 2, 3, 4, 5])
    tree.lock(node)
    add(tree, pools, [1, 2, 9])
    assert node.length == 5
    assert tree.num_evictable() == 1
    tree.unlock(node)
    assert tree.num_evictable() == 6
    tree.check([])


def test_a_moved_lock_equals_a_new_one() -> None:
    tree, pools = tree_of([1, 2])
    node = tree.match(tree.root(""), [1, 2], 2).node
    tree.lock(node)
    leaf = add(tree, pools, [1, 2, 3])
    tree.lock(leaf, above=node)
    assert tree.num_evictable() == 0
    tree.unlock(leaf)
    assert tree.num_evictable() == 3
    tree.check([])


def test_revoked_pages_come_back_with_the_last_lock() -> None:
    tree, pools = tree_of([1, 2])
    written = add(tree, pools, [1, 2, 3, 4, 5], step_id=7)
    tree.lock(written)
    reader = tree.match(tree.root(""), [1, 2, 3, 4, 8], 5).node  # splits what step 7 writes
    tree.lock(reader)
    below = add(tree, pools, [1, 2, 3, 4, 8, 9])
    tree.revoke(written)
    assert written.revoked
    assert reader.revoked
    assert below.revoked
    assert length_of(tree, [1, 2, 3, 4, 8, 9]) == 2
    assert pools[0].num_taken == 5  # [1, 2] and what is locked; `below` was free to go
    add(tree, pools, [1, 2, 3])
    tree.unlock(reader)
    tree.unlock(written)
    assert pools[0].num_taken == 3
    tree.check([])


def test_flush_empties_every_namespace() -> None:
    tree, pools = tree_of([1, 2, 3], [1, 5])
    tree.flush()
    assert pools[0].num_taken == tree.num_pages() == tree.num_evictable() == 0
    assert tree.evict(1) == 0
    add(tree, pools, [1, 2])
    assert tree.evict(1) == 2


class Mirror:
    """What can be matched, by what a listener hears: the whole units of prefixes."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.prefixes: set[tuple[str, tuple[int, ...]]] = set()

    def units(self, node: Node) -> set[tuple[str, tuple[int, ...]]]:
        namespace, tokens = prefix_of(node)
        ends = range(node.start + self.unit, node.length + 1, self.unit)
        return {(namespace, tuple(tokens[:end])) for end in ends}

    def stored(self, node: Node) -> None:
        assert not self.units(node) & self.prefixes
        self.prefixes |= self.units(node)

    def removed(self, node: Node) -> None:
        assert self.units(node) <= self.prefixes
        self.prefixes -= self.units(node)


class Trees(RuleBasedStateMachine):
    """Random use of one tree. The model: (namespace, prefix of whole units) -> pages of its last unit."""

    page_size, unit, num_pages = 2, 4, 40
    prompts = st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 2), max_size=24))

    def __init__(self) -> None:
        super().__init__()
        self.pools = [PagePool(self.num_pages), PagePool(self.num_pages + 5)]
        self.tree = PrefixTree(self.pools, self.page_size, self.unit)
        self.tree.listener = self.mirror = Mirror(self.unit)
        self.model: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], ...]] = {}
        self.held: list[tuple[str, list[int], Node, int]] = []
        self.step = 0

    def known(self, namespace: str, tokens: list[int], limit: int) -> int:
        length = 0
        while length + self.unit <= limit and (namespace, tuple(tokens[: length + self.unit])) in self.model:
            length += self.unit
        return length

    @rule(prompt=prompts, cut=st.integers(0, 30))
    def find(self, prompt: tuple[str, list[int]], cut: int) -> None:
        namespace, tokens = prompt
        limit = min(cut, len(tokens))
        match = self.tree.match(self.tree.root(namespace), tokens, limit)
        assert match.length == match.node.length == self.known(namespace, tokens, limit)
        for group, ids in enumerate(match.pages):
            ends = range(self.unit, match.length + 1, self.unit)
            assert tuple(ids) == sum((self.model[namespace, tuple(tokens[:end])][group] for end in ends), ())

    @rule(prompt=prompts, hold=st.booleans())
    def insert(self, prompt: tuple[str, list[int]], hold: bool) -> None:
        namespace, tokens = prompt
        length = len(tokens) // self.unit * self.unit
        match = self.tree.match(self.tree.root(namespace), tokens, length)
        node, step_id, number = match.node, -1, (length - match.length) // self.page_size
        if number and min(pool.num_free for pool in self.pools) >= number:
            pages = [pool.allocate(number) or [] for pool in self.pools]
            step_id = self.step = self.step + 1
            node = self.tree.extend(node, tokens, length, pages, step_id)
            width = self.unit // self.page_size
            for index, end in enumerate(range(match.length + self.unit, length + 1, self.unit)):
                cut = slice(index * width, (index + 1) * width)
                self.model[namespace, tuple(tokens[:end])] = tuple(tuple(ids[cut]) for ids in pages)
        if hold:
            self.tree.lock(node)
            self.held.append((namespace, tokens[: node.length], node, step_id))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        _, _, node, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.tree.unlock(node)

    @rule(number=st.integers(1, 12))
    def evict(self, number: int) -> None:
        possible, free = self.tree.num_evictable(), self.pools[0].num_free
        freed = self.tree.evict(number)
        assert freed >= min(number, possible)
        assert self.pools[0].num_free == free + freed
        self.forget_what_is_gone()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        namespace, tokens, node, step_id = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        if step_id < 0 or node.revoked:
            return
        self.tree.revoke(node)
        assert self.known(namespace, tokens, len(tokens)) == len(tokens)
        self.forget_what_is_gone()
        assert self.known(namespace, tokens, len(tokens)) < len(tokens)
        assert all(
            held.revoked for space, path, held, _ in self.held if space == namespace and path[: len(tokens)] == tokens
        )

    @rule()
    def flush(self) -> None:
        if not self.held:
            self.tree.flush()
            self.model.clear()

    def forget_what_is_gone(self) -> None:
        """Align the model with the tree; what is locked must be there still."""
        for namespace, tokens in list(self.model):
            if self.tree.match(self.tree.root(namespace), list(tokens), len(tokens)).length < len(tokens):
                del self.model[namespace, tokens]

    @invariant()
    def counts_agree(self) -> None:
        self.tree.check([Holder(node) for _, _, node, _ in self.held])
        width = self.unit // self.page_size
        revoked = {id(node): len(node.pages[0]) for node in self.revoked_nodes()}
        assert self.tree.num_pages() == len(self.model) * width + sum(revoked.values())
        for pool in self.pools:
            assert pool.num_taken == self.tree.num_pages()
        locked = {
            (namespace, tuple(tokens[:end]))
            for namespace, tokens, node, _ in self.held
            if not node.revoked
            for end in range(self.unit, len(tokens) + 1, self.unit)
        }
        assert locked <= set(self.model)
        assert self.mirror.prefixes == set(self.model)

    def revoked_nodes(self) -> list[Node]:
        found = []
        for _, _, held, _ in self.held:
            node: Node | None = held
            while node is not None and node.revoked:
                found.append(node)
                node = node.parent
        return found


TestTrees = Trees.TestCase
TestTrees.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
