"""Which requests are refused at once, and who is next among those that wait.

Requests are ranked in batches: the oldest ones, up to `BATCH_SIZE`, in the order of the policy. A batch is used up
before the next one is ranked, so a policy can let a request be overtaken by `BATCH_SIZE - 1` others at most: nobody
starves, and the cost of ranking is paid once per batch. Priorities come before every policy, and know no such bound.

Knows no memory: how much of a request is cached is told by who makes the queue.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hornbeam.cache.node import Node
from hornbeam.config.components import SchedulerOptions
from hornbeam.core.errors import BadRequest
from hornbeam.core.request import Request
from hornbeam.scheduler.state import RequestState

BATCH_SIZE = 128

KnownPrefix = Callable[[RequestState], tuple[list[Node], int]]  # see `Memory.known_prefix`
Precedence = Callable[[Request], int]  # the smallest goes first, whatever the policy


def precedence_of(options: SchedulerOptions) -> Precedence:
    """By the request's priority, if priorities count."""
    if not options.priorities:
        return lambda request: 0
    return (lambda request: request.priority) if options.low_priority_first else (lambda request: -request.priority)


def _arrived(batch: list[RequestState], known: KnownPrefix) -> list[RequestState]:
    return batch


def _longest_prefix_first(batch: list[RequestState], known: KnownPrefix) -> list[RequestState]:
    """Among equals, those that will share a prefix stand side by side."""
    lengths = {state: known(state)[1] for state in batch}
    return sorted(batch, key=lambda state: (-lengths[state], state.tokens))


def _heaviest_branch_first(batch: list[RequestState], known: KnownPrefix) -> list[RequestState]:
    """Depth first through the tree; where it branches, the side on which more requests wait comes first."""
    paths = {state: known(state)[0] for state in batch}
    weights = Counter(node for path in paths.values() for node in path)
    order = {node: index for index, node in enumerate(weights)}
    # What ends at a node comes after what goes deeper from there.
    turns = {state: [*((-weights[node], order[node]) for node in path), (1, 0)] for state, path in paths.items()}
    return sorted(batch, key=lambda state: (turns[state], state.tokens))


def _longest_output_first(batch: list[RequestState], known: KnownPrefix) -> list[RequestState]:
    return sorted(batch, key=lambda state: state.num_prompt - state.max_tokens)


POLICIES: dict[str, Callable[[list[RequestState], KnownPrefix], list[RequestState]]] = {
    "fcfs": _arrived,
    "lpm": _longest_prefix_first,
    "dfs-weight": _heaviest_branch_first,
    "lof": _longest_output_first,
}
RANDOM = "random"


class WaitingQueue:
    """The requests that wait, owner of their order.

    Args:
        policy: a key of `POLICIES`, or `RANDOM`.
        known: what the tree holds of a request's prefix.
        precedence: see `precedence_of`.
        seed: of the random policy.
    """

    def __init__(self, policy: str, known: KnownPrefix, precedence: Precedence, seed: int) -> None:
        self._rank = POLICIES[policy] if policy != RANDOM else self._shuffled
        self._known = known
        self._precedence = precedence
        self._random = random.Random(seed)
        self._waiting: dict[RequestState, None] = {}
        self._batch: list[RequestState] = []  # next one last

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, state: RequestState) -> None:
        """A new request."""
        self._waiting[state] = None
        if self._batch and self._key(state) < self._key(self._batch[-1]):
            self._batch.clear()

    def push_back(self, state: RequestState) -> None:
        """A request that has run already; among those of its priority it is the next."""
        self.push(state)
        if self._batch and self._key(state) == self._key(self._batch[-1]):
            self._batch.append(state)

    def remove(self, state: RequestState) -> None:
        """It has been admitted, or has ended."""
        del self._waiting[state]
        if self._batch and self._batch[-1] is state:
            self._batch.pop()
        elif state in self._batch:
            self._batch.remove(state)

    def head(self) -> RequestState | None:
        """Who is next; the same one until it is removed, or a request with precedence comes."""
        if not self._batch and self._waiting:
            self._batch = self._rank_batch(self._waiting)
        return self._batch[-1] if self._batch else None

    def displaced_by(self, request: Request) -> RequestState | None:
        """The last to be served, if it has not run yet and a new `request` has precedence over it."""
        worst = max(self._waiting, key=lambda state: (self._key(state), state.arrival), default=None)
        if worst is None or worst.num_retractions or self._precedence(request) >= self._key(worst):
            return None
        return worst

    def _rank_batch(self, waiting: Iterable[RequestState]) -> list[RequestState]:
        states = sorted(waiting, key=lambda state: (self._key(state), not state.num_retractions, state.arrival))
        leading = self._key(states[0])
        batch = [state for state in states[:BATCH_SIZE] if self._key(state) == leading]
        begun = [state for state in batch if state.num_retractions]
        fresh = self._rank([state for state in batch if not state.num_retractions], self._known)
        return [*reversed(fresh), *reversed(begun)]

    def _key(self, state: RequestState) -> int:
        return self._precedence(state.request)

    def _shuffled(self, batch: list[RequestState], known: KnownPrefix) -> list[RequestState]:
        return self._random.sample(batch, len(batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may be.

    Args:
        context_len: prompt and generated tokens, at most.
        vocab_size: prompt ids are below it.
        max_total_tokens: what the cache can hold.
    """

    context_len: int
    vocab_size: int
    max_total_tokens: int

    def check(self, request: Request) -> None:
        """Raises BadRequest for a request that can never be served; the message has the numbers."""
        ids, num_prompt = request.prompt_ids, len(request.prompt_ids)
        if request.adapter is not None:
            raise BadRequest("adapters are not supported yet", "lora_path")
        if not ids:
            raise BadRequest("the prompt is empty", "input_ids")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise BadRequest(f"prompt token ids must be at least 0 and below {self.vocab_size}", "input_ids")
        room_needed = 0 if request.sampling.max_new_tokens == 0 else 1
        if num_prompt + room_needed > self.context_len:
            raise BadRequest(
                f"the prompt has {num_prompt} tokens; with the context length of {self.context_len} at most "
                f"{self.context_len - room_needed} can be served",
                "input_ids",
            )
        if num_prompt > self.max_total_tokens:
            raise BadRequest(
                f"the prompt has {num_prompt} tokens, but the cache holds max_total_tokens={self.max_total_tokens}",
                "input_ids",
            )
