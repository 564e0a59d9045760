"""The nodes of the prefix tree, what it is asked and told, and the orders in which nodes are evicted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

WRITTEN = -1  # `step_id` of a node whose rows were complete when it was added


@dataclass(slots=True, eq=False)
class Node:
    """The tokens `start .. length` of a prefix. Only the tree changes it."""

    parent: "Node | None"
    key: list[int]
    pages: list[list[int]]  # [group][page]; none in a windowed group: a tombstone
    length: int  # tokens from the root to this node's end
    holds: list[int]  # [group]: who needs it as part of a window; windowed groups only
    step_id: int = WRITTEN  # the step that writes the rows
    namespace: str = ""
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)  # by their first unit
    num_locks: int = 0
    used_at: int = 0
    num_uses: int = 0  # ended requests that had it on their path
    priority: int = 0  # the highest of theirs
    queued: bool = False  # has its entry in the eviction queue
    revoked: bool = False  # out of the tree: its pages go back with its last lock

    @property
    def start(self) -> int:
        """Tokens from the root to this node's begin."""
        return self.length - len(self.key)

    @property
    def whole(self) -> bool:
        """Every group has its pages."""
        return all(self.pages)


# What is evicted first has the smallest key. slru: what was used once goes before all that was used again.
EVICTION_ORDERS: dict[str, Callable[[Node], tuple[int, int]]] = {
    "lru": lambda node: (0, node.used_at),
    "lfu": lambda node: (node.num_uses, node.used_at),
    "slru": lambda node: (min(node.num_uses, 2), node.used_at),
    "priority": lambda node: (node.priority, node.used_at),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The longest known prefix below a start node."""

    node: Node
    length: int  # tokens from the root
    pages: tuple[list[int], ...]  # per group, of the tokens between start node and `length`; 0 for a tombstone's


@dataclass(frozen=True, slots=True)
class Holder:
    """One lock: its node, and per windowed group the begin of what is held of the path."""

    node: Node
    held_from: dict[int, int] = field(default_factory=dict)


def path_of(node: Node) -> Iterator[Node]:
    """`node` and its ancestors."""
    walk: Node | None = node
    while walk is not None:
        yield walk
        walk = walk.parent


def nodes_below(node: Node) -> Iterator[Node]:
    """`node` and everything below, parents first."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
