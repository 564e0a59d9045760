"""The books of the prefix tree, made again from its nodes and from what is held, to find errors in those that are kept.

Linear in the tree: for tests, and for moments in which nothing runs.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from hornbeam.cache.node import Holder, Node, path_of


def check_nodes(
    nodes: set[Node],
    holders: Sequence[Holder],
    *,
    unit: int,
    page_size: int,
    windows: Collection[int],
    num_pages: Sequence[int],
    num_evictable: Sequence[int],
) -> None:
    """Verify the structure, and every count given the locks. Raises AssertionError.

    Args:
        nodes: all that can be matched, and the roots.
        holders: of all locks.
        unit: tokens that keys are multiples of.
        page_size: tokens per page.
        windows: the windowed groups.
        num_pages: per group, as counted: of all nodes, those included that are only locked.
        num_evictable: per group, as counted: of the nodes that nobody uses.
    """
    locks = Counter(node for holder in holders for node in path_of(holder.node))
    _check_structure(nodes, unit)
    for node in nodes | locks.keys():
        assert node.num_locks == locks[node], f"{node.num_locks} locks at {node.length} tokens, {locks[node]} held"
    for group, counted in enumerate(num_pages):
        windowed = group in windows
        uses = locks
        if windowed:
            paths = ((node, holder) for holder in holders for node in path_of(holder.node) if node.parent)
            uses = Counter(node for node, holder in paths if node.start >= holder.held_from[group])
            for node in nodes | locks.keys():
                assert node.holds[group] == uses[node], f"{node.holds[group]} windows, {uses[node]} held"
        for node in nodes | locks.keys():
            num_own = len(node.pages[group])
            assert num_own * page_size == len(node.key) or (windowed and not num_own), "pages and tokens"
        num_found = sum(len(node.pages[group]) for node in nodes | locks.keys())
        assert num_found == counted, f"group {group}: {num_found} pages in the tree, {counted} counted"
        num_found, counted = sum(len(node.pages[group]) for node in nodes if not uses[node]), num_evictable[group]
        assert num_found == counted, f"group {group}: {num_found} evictable pages, {counted} counted"


def _check_structure(nodes: set[Node], unit: int) -> None:
    for node in nodes:
        assert not node.revoked, "a revoked node can be matched"
        if node.parent is not None:
            assert node.parent.children[tuple(node.key[:unit])] is node, "a child stands under a wrong key"
            assert node.length == node.parent.length + len(node.key), "lengths do not add up"
            assert len(node.key) % unit == 0, "a node ends inside a unit"
            assert node.queued or node.num_locks or node.children, "a leaf that can never be evicted"
            assert all(node.pages) or node.num_locks or node.children, "a tombstone that nobody can reach"
