"""The policies that rank waiting requests by what they ask for, or by what the cache and the running ones have.

What has come first and the random order need none of that; the queue has them. Knows nothing of queues.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hornbeam.cache.node import Node
from hornbeam.scheduler.state import RequestState

KnownPrefix = Callable[[RequestState], tuple[list[Node], int]]  # see `Memory.known_prefix`


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What policies may look at, besides those that wait."""

    known: KnownPrefix  # what the tree holds of a request's prefix
    running: Iterable[RequestState]


Policy = Callable[[list[RequestState], Surroundings], list[RequestState]]  # gets a batch in the order of arrival


def _longest_prefix_first(batch: list[RequestState], around: Surroundings) -> list[RequestState]:
    """Among equals, those that will share a prefix stand side by side."""
    lengths = {state: around.known(state)[1] for state in batch}
    return sorted(batch, key=lambda state: (-lengths[state], state.tokens))


def _heaviest_branch_first(batch: list[RequestState], around: Surroundings) -> list[RequestState]:
    """Depth first through the tree; where it branches, the side whose requests use more, by head, comes first."""
    found = {state: around.known(state) for state in batch}
    uses: dict[Node, list[int]] = {}
    for path, length in found.values():
        for node in path:
            uses.setdefault(node, []).append(length)
    weights = {node: (-sum(lengths) / len(lengths), -len(lengths)) for node, lengths in uses.items()}
    order = {node: index for index, node in enumerate(weights)}
    # What ends at a node comes after what goes deeper from there.
    turns = {state: [*((*weights[node], order[node]) for node in path), (1,)] for state, (path, _) in found.items()}
    return sorted(batch, key=lambda state: (turns[state], state.tokens))


def _longest_output_first(batch: list[RequestState], around: Surroundings) -> list[RequestState]:
    return sorted(batch, key=lambda state: state.num_prompt - state.max_tokens)


def _busiest_routing_key_first(batch: list[RequestState], around: Surroundings) -> list[RequestState]:
    """Those whose routing key most running requests have; equals by key, in the order in which the keys came."""
    running = Counter(state.request.routing_key for state in around.running)
    del running[None]
    order: dict[str | None, int] = {}
    for state in batch:
        order.setdefault(state.request.routing_key, len(order))
    return sorted(batch, key=lambda state: (-running[state.request.routing_key], order[state.request.routing_key]))


POLICIES: dict[str, Policy] = {
    "lpm": _longest_prefix_first,
    "dfs-weight": _heaviest_branch_first,
    "lof": _longest_output_first,
    "routing-key": _busiest_routing_key_first,
}
