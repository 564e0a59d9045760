"""Which decode rows begin with the same tokens in the prefix tree, so that attention can read those once for all.

Each row belongs to one group at most (one level of sharing), and groups are chosen so that they save the most reading.
Whether that is worth its cost on the device at hand, the executor decides.
"""

from collections import defaultdict
from collections.abc import Sequence

from hornbeam.cache.node import Node
from hornbeam.core.plan import SharedPrefix
from hornbeam.scheduler.state import RequestState


class Sharing:
    """Groups rows anew only when other rows decode than the last time."""

    def __init__(self) -> None:
        self._rows: Sequence[RequestState] = ()
        self._groups: tuple[SharedPrefix, ...] = ()

    def find(self, rows: Sequence[RequestState]) -> tuple[SharedPrefix, ...]:
        """The groups among a step's decode rows, in the order of their lengths."""
        if rows != self._rows:
            self._rows, self._groups = rows, _groups(rows)
        return self._groups


def _groups(rows: Sequence[RequestState]) -> tuple[SharedPrefix, ...]:
    """A node is a group's prefix if that saves at least what groups further down would save together."""
    members: defaultdict[Node, list[int]] = defaultdict(list)
    for index, state in enumerate(rows):
        node = state.node
        while node is not None and node.parent is not None:
            members[node].append(index)
            node = node.parent
    shared = sorted((node for node in members if len(members[node]) > 1), key=lambda node: node.length)
    saved_below: defaultdict[Node | None, int] = defaultdict(int)
    chosen = []
    for node in reversed(shared):
        saved = (len(members[node]) - 1) * node.length
        if saved >= saved_below[node]:
            chosen.append(node)
        saved_below[node.parent] += max(saved, saved_below[node])
    groups: list[SharedPrefix] = []
    grouped: set[int] = set()
    for node in reversed(chosen):  # from the root down: what lies below a chosen node is part of its group
        if members[node][0] not in grouped:
            groups.append(SharedPrefix(rows=tuple(members[node]), num_tokens=node.length))
            grouped.update(members[node])
    return tuple(groups)
