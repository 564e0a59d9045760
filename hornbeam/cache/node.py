"""The nodes of the prefix tree, and what it is asked and told."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The longest known prefix below a start node."""

    node: Node
    length: int  # tokens from the root
    pages: tuple[list[int], ...]  # per group, of the tokens between start node and `length`; 0 for a tombstone's


class PrefixListener(Protocol):
    """Hears which prefixes can be matched: what routers choose an engine by, and tiers copy.

    Both calls come while the node stands in its place, so that `prefix_of` has all its tokens. Nodes may be split in
    between: what was stored at once may be removed in parts, the later part of a prefix always first.
    """

    def stored(self, node: Node) -> None:
        """The tokens `node.start .. node.length` of a prefix have come; a running step may still write their rows."""

    def removed(self, node: Node) -> None:
        """They have gone: evicted, flushed, or revoked with a failed step."""


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


def prefix_of(node: Node) -> tuple[str, list[int]]:
    """The namespace, and the tokens from the root to the node's end."""
    path = list(path_of(node))
    return path[-1].namespace, [token for part in reversed(path) for token in part.key]


def nodes_below(node: Node) -> Iterator[Node]:
    """`node` and everything below, parents first."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def common_length(key: list[int], tokens: list[int], position: int, limit: int, unit: int) -> int:
    """Tokens, in whole units, that `key` and `tokens[position:limit]` share; the first unit is known to match."""
    longest = min(len(key), (limit - position) // unit * unit)
    if tokens[position : position + longest] == key[:longest]:
        return longest
    low, high = 1, longest // unit  # units: `low` are equal, `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        begin, end = low * unit, middle * unit
        if tokens[position + begin : position + end] == key[begin:end]:
            low = middle
        else:
            high = middle
    return low * unit
