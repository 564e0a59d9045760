"""Which requests are refused at once, and who is next among those that wait.

The oldest ones, up to `WINDOW`, are ranked in the order of the policy; when the first `ROUND` of them have gone, they
are ranked again, as the cache has changed. That would let a policy starve the unlucky, so a request that as many later
ones have overtaken as wait now goes next. Priorities come before every policy, but every `FAIR_SHARE`-th turn belongs
to the oldest request, whatever its priority. So nobody starves, and no clock is asked.

Knows no memory: how much of a request is cached is told by who makes the queue.
"""

import heapq
import random
from dataclasses import dataclass

from hornbeam.config.components import SchedulerOptions
from hornbeam.core.errors import BadRequest
from hornbeam.core.request import Request
from hornbeam.scheduler.policies import POLICIES, Surroundings
from hornbeam.scheduler.state import RequestState

WINDOW = 512
ROUND = 32
FAIR_SHARE = 64

FIRST_COME, RANDOM = "fcfs", "random"  # the policies that look at nothing
AGED = float("-inf")  # the precedence of a request whose turn it is in spite of its priority


@dataclass(frozen=True, slots=True)
class Precedence:
    """Who goes before whom, whatever the policy: the smallest number goes first."""

    options: SchedulerOptions

    def of(self, request: Request) -> float:
        """By its priority, if priorities count."""
        if not self.options.priorities:
            return 0
        return request.priority if self.options.low_priority_first else -request.priority

    def now(self, state: RequestState) -> float:
        """The same, of a request that may have waited for long enough."""
        return AGED if state.aged else self.of(state.request)


class WaitingQueue:
    """The requests that wait, owner of their order.

    Args:
        policy: a key of `POLICIES`, `FIRST_COME` or `RANDOM`.
        around: what the policy may look at.
        precedence: what comes before the policy.
        seed: of the random policy.
    """

    def __init__(self, policy: str, around: Surroundings, precedence: Precedence, seed: int) -> None:
        self._rank = {FIRST_COME: self._as_they_came, RANDOM: self._shuffled, **POLICIES}[policy]
        self._around = around
        self._precedence = precedence
        self._random = random.Random(seed)
        self._waiting: dict[RequestState, None] = {}
        self._batch: list[RequestState] = []  # next one last
        self._by_age: list[tuple[int, int, RequestState]] = []  # a heap by arrival; some have left since
        self._num_pushed = 0
        self._num_arrived = self._num_left = 0  # requests that ever came, and turns that were taken

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, state: RequestState) -> None:
        """A new request."""
        self._waiting[state] = None
        self._num_pushed += 1
        self._num_arrived = max(self._num_arrived, state.arrival + 1)
        heapq.heappush(self._by_age, (state.arrival, self._num_pushed, state))
        if self._batch and self._precedence.now(state) < self._precedence.now(self._batch[-1]):
            self._batch.clear()

    def push_back(self, state: RequestState) -> None:
        """A request that has run already; among those of its priority it is the next."""
        self.push(state)
        if self._batch and self._precedence.now(state) == self._precedence.now(self._batch[-1]):
            self._batch.append(state)

    def remove(self, state: RequestState) -> None:
        """It has been admitted, or has ended."""
        del self._waiting[state]
        self._num_left += 1
        if not self._waiting:
            self._by_age.clear()
        if self._batch and self._batch[-1] is state:
            self._batch.pop()
        elif state in self._batch:
            self._batch.remove(state)

    def head(self) -> RequestState | None:
        """Who is next; the same one until it is removed, or a request with precedence comes."""
        if not self._waiting:
            return None
        if not self._batch:
            self._rank_batch()
        self._help_the_oldest()
        return self._batch[-1]

    def displaced_by(self, request: Request) -> RequestState | None:
        """The last to be served, if it has not run yet and a new `request` has precedence over it."""
        worst = max(self._waiting, key=lambda state: (self._precedence.now(state), state.arrival), default=None)
        if worst is None or worst.num_retractions or self._precedence.of(request) >= self._precedence.now(worst):
            return None
        return worst

    def _help_the_oldest(self) -> None:
        while self._by_age[0][2] not in self._waiting:
            heapq.heappop(self._by_age)
        oldest, first = self._by_age[0][2], self._batch[-1]
        if self._precedence.now(oldest) > self._precedence.now(first):
            if self._num_left % FAIR_SHARE == FAIR_SHARE - 1:
                oldest.aged = True
                self._batch.append(oldest)
        elif oldest is not first:
            num_overtaken = self._num_arrived - oldest.arrival - len(self._waiting)
            if num_overtaken >= max(ROUND, len(self._waiting)):
                if oldest in self._batch:
                    self._batch.remove(oldest)
                self._batch.append(oldest)

    def _rank_batch(self) -> None:
        precedence = self._precedence.now
        states = sorted(self._waiting, key=lambda state: (precedence(state), not state.num_retractions, state.arrival))
        leading = precedence(states[0])
        window = [state for state in states[:WINDOW] if precedence(state) == leading]
        begun = [state for state in window if state.num_retractions]
        fresh = self._rank([state for state in window if not state.num_retractions], self._around)
        self._batch = [*reversed(fresh[:ROUND]), *reversed(begun)]

    def _as_they_came(self, batch: list[RequestState], around: Surroundings) -> list[RequestState]:
        return batch

    def _shuffled(self, batch: list[RequestState], around: Surroundings) -> list[RequestState]:
        return self._random.sample(batch, len(batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may be.

    Args:
        context_len: prompt and generated tokens, at most.
        max_total_tokens: what the cache can hold.
    """

    context_len: int
    max_total_tokens: int

    def check(self, request: Request) -> None:
        """Raises BadRequest for a request that can never be served; the message has the numbers."""
        ids, num_prompt = request.prompt_ids, len(request.prompt_ids)
        if request.adapter is not None:
            raise BadRequest("adapters are not supported yet", "lora_path")
        if not ids:
            raise BadRequest("the prompt is empty", "input_ids")
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
