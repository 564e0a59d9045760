"""What the next step does: decode rows first, then begun prompts, then the queue's head as long as it fits.

When pages are short, a request is retracted: it gives its memory back and waits again, with what it has generated.
Knows no clients: who ends is told to `finish`.
"""

from collections.abc import Callable

from hornbeam.config.components import SchedulerOptions
from hornbeam.core.plan import PageGrant
from hornbeam.core.request import Finish, Status
from hornbeam.scheduler.memory import Memory, Running
from hornbeam.scheduler.state import RequestState, Step
from hornbeam.scheduler.waiting import Precedence, WaitingQueue

# With pages smaller than this, a decode row takes several at once, so that page tables change rarely.
GRANT_TOKENS = 16
FIRST_GUESS = 64.0  # generated tokens, before any request has ended
LEARNING_RATE = 0.05  # weight of the latest request in the mean
MAX_SLOWDOWN = 1.5  # of a step by prompts, where streams come first: a factor of 2 is what they may notice
PACE_LEARNING_RATE = 0.2
FEW = 4  # prompts that wait, beside any number of streams
LEAST_SHARE = 64  # of the chunk size: smaller stretches cost more than they smooth
GROUP = 16  # one in so many decode rows: prompts that start together, where nobody reads along
PATIENCE = 8  # steps that they wait for each other


class OutputEstimate:
    """How many tokens requests generate, learned from those that have ended. `scale`: times what is observed."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._mean = FIRST_GUESS

    def learn(self, num_generated: int) -> None:
        """A request has ended by itself."""
        self._mean += LEARNING_RATE * (num_generated - self._mean)

    def to_come(self, state: RequestState) -> float:
        """Tokens that a running request will still generate, by experience."""
        num_generated = max(0, state.kv_len - state.num_prompt)
        return min(max(0.0, self._mean * self._scale - num_generated), state.max_tokens - state.num_prompt)


class Pace:
    """How many prompt tokens a step may have for the streams that run to go on at a steady pace.

    Steps of decode rows alone tell what the streams are used to; where even the fewest prompt tokens take longer, that
    is what cannot be helped. From one mixed step to the next the limit moves in proportion to the time that was left
    or overdrawn: as time grows no faster than the number of tokens, that never overshoots. Knows no clock: what it
    learns from is part of a record.
    """

    def __init__(self, chunk_size: int) -> None:
        self._least = max(1, chunk_size // LEAST_SHARE)
        self._limit = float(self._least)
        self._least_seconds = 0.0  # of a step with the fewest prompt tokens
        self.decode_seconds = 0.0  # of a step without any; 0: not known yet

    @property
    def max_prompt_tokens(self) -> int | None:
        """Of a mixed step; None as long as nothing is known."""
        return int(self._limit) if self.decode_seconds else None

    def learn(self, num_decode: int, num_prompt: int, seconds: float) -> None:
        """A step of so many decode rows and prompt tokens took so long."""
        if num_prompt == 0:
            self.decode_seconds = _approach(self.decode_seconds, seconds)
        elif num_decode and self.decode_seconds:
            if num_prompt <= self._least:
                self._least_seconds = _approach(self._least_seconds, seconds)
            allowed = MAX_SLOWDOWN * max(self.decode_seconds, self._least_seconds)
            fair = num_prompt * min(2.0, allowed / seconds)
            is_slow = fair < num_prompt
            self._limit = max(self._least, min(self._limit, fair) if is_slow else max(self._limit, fair))


def _approach(known: float, seconds: float) -> float:
    """Trust a new time a little, and one that is out of the ordinary less."""
    return known + PACE_LEARNING_RATE * (min(seconds, 2 * known) - known) if known else seconds


def _num_left(state: RequestState) -> int:
    """Tokens of a begun prompt."""
    return state.prefill_end - state.kv_len


class Planner:
    """Moves requests from the queue to the running ones, and on from step to step.

    Args:
        options: limits and policy.
        memory, queue, running, estimate: the scheduler's own.
        precedence: what is retracted last goes first here, too.
        finish: ends a request that can never go on.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        memory: Memory,
        queue: WaitingQueue,
        running: Running,
        estimate: OutputEstimate,
        precedence: Precedence,
        finish: Callable[[RequestState, Finish], None],
    ) -> None:
        self._options = options
        self._memory = memory
        self._queue = queue
        self._running = running
        self._estimate = estimate
        self._precedence = precedence
        self._finish = finish
        self.pace = Pace(memory.chunk_size)
        self._reserve: float | None = None  # tokens that who runs will generate; None: not summed up in this step yet
        self._num_gathering = 0  # steps in a row in which prompts could have started
        self.num_retractions = self.num_preemptions = 0

    def plan(self, step_id: int, *, in_flight: bool) -> Step:
        """The next step; an empty one if nothing can run now. `in_flight`: some result is still to come."""
        while True:
            step = Step(step_id=step_id)
            if self._options.mixes:
                self._plan_decode(step)
            self._plan_chunks(step)
            if not self._options.mixes and not step.chunks:
                self._plan_decode(step)
            short = step.starved or (step.empty and not in_flight)
            if not (short and self._relieve() and step.empty):
                return step  # else there is room now: try again

    def _plan_decode(self, step: Step) -> None:
        """One token for every request whose prompt is done; one that finds no page waits."""
        step_id, rows, slots, lens = step.step_id, step.rows, step.decode, step.decode_lens
        ended: list[RequestState] = []
        for state in self._running.decoding:
            kv_len = state.kv_len + 1
            if kv_len > state.capacity:
                ahead = min(kv_len + GRANT_TOKENS - 1, state.last_kv_len)
                if not (self._memory.grow(state, ahead) or self._memory.grow(state, kv_len)):
                    step.starved = True
                    continue
                self._grant(state, step)
            state.kv_len = kv_len
            state.last_step = step_id
            rows.append(state)
            slots.append(state.slot)
            lens.append(kv_len)
            if kv_len == state.last_kv_len:
                ended.append(state)
        for state in ended:
            del self._running.decoding[state]
            self._running.ending[state] = None

    def _plan_chunks(self, step: Step) -> None:
        """Stretches of prompts, up to the budget: begun prompts first, then the queue's head as long as it fits.

        A prompt that would fill the step leaves up to half of it to short ones, unless it has precedence over them.
        """
        begun, head = list(self._running.prefilling), self._queue.head()
        if not begun and (head is None or self._gathers(head)):
            return
        budget, self._reserve = self._prompt_budget(), None
        share = budget // 2
        if begun and _num_left(begun[0]) > budget and share >= self._memory.unit:
            budget -= self._plan_prompts(begun[1:], share, step, begun[0])
            begun = [state for state in self._running.prefilling if state.last_step != step.step_id]
        self._plan_prompts(begun, budget, step)

    def _gathers(self, head: RequestState) -> bool:
        """Whether prompts wait for more to start with, for a few steps: a step with prompts has its price, how few."""
        num_ready = min(self._memory.num_free_slots, len(self._queue))
        few = 0 < num_ready < len(self._running.decoding) // GROUP
        if not few or self._num_gathering == PATIENCE or head.request.streamed or self._is_read_along():
            self._num_gathering = 0
            return False
        self._num_gathering += 1
        return True

    def _is_read_along(self) -> bool:
        return any(state.request.streamed for state in self._running.decoding)

    def _may_share(self, head: RequestState, long: RequestState) -> bool:
        """Whether the queue's head is short, and `long`, which fills steps, has no precedence over it."""
        most_left = min(self._memory.chunk_size, _num_left(long)) // 2  # more alike, they gain nothing
        num_left = len(head.tokens) - self._memory.known_prefix(head)[1]
        return num_left <= most_left and self._precedence.now(head) <= self._precedence.now(long)

    def _plan_prompts(self, begun: list[RequestState], most: int, step: Step, long: RequestState | None = None) -> int:
        """Next stretches of `begun`, then heads of the queue, beside `long` short ones; their tokens, up to `most`."""
        budget = most
        for state in begun:
            num_tokens = self._plan_chunk(state, budget, step)
            if num_tokens == 0:
                return most - budget
            budget -= num_tokens
        limit = self._options.max_prefill_tokens
        while budget >= self._memory.unit and most - budget < limit and (head := self._queue.head()) is not None:
            if long is not None and not self._may_share(head, long):
                break
            ready = head not in self._running.leaving and self._memory.num_free_slots
            num_tokens = self._admit(head, budget, step) if ready else 0
            if num_tokens == 0:
                self._preempt(head)
                break
            budget -= num_tokens
        return most - budget

    def _prompt_budget(self) -> int:
        """Prompt tokens of the next step. Streams set the pace, unless many wait (for throughput) or none is read."""
        limit, num_streams = self.pace.max_prompt_tokens, len(self._running.decoding)
        num_waiting = len(self._running.prefilling) + len(self._queue)
        many_wait = num_waiting > max(FEW, num_streams // FEW)
        if limit is None or many_wait or not self._options.mixes or not self._is_read_along():
            return self._memory.chunk_size
        return min(self._memory.chunk_size, max(limit, self._memory.unit))

    def _admit(self, state: RequestState, budget: int, step: Step) -> int:
        """Start the queue's head, if there is room. Returns the tokens planned, 0 if it has to wait."""
        state.prefill_end = len(state.tokens)
        state.rescore()
        self._memory.attach(state)
        num_cached = state.kv_len
        num_tokens = self._plan_chunk(state, budget, step) if self._has_room(state) else 0
        if num_tokens == 0:
            self._memory.release(state)
            return 0
        self._queue.remove(state)
        state.status = Status.RUNNING
        state.since = None
        step.starts.append(state.slot_start(num_cached))
        if self._reserve is not None:
            self._reserve += self._estimate.to_come(state)
        return num_tokens

    def _has_room(self, state: RequestState) -> bool:
        """The rule of admission: beside the prompts begun and this one, a reserve stays for what will be generated.

        With nobody running it is met by definition, as a prompt that cannot fit alone was refused.
        """
        if not len(self._running):
            return True
        if self._reserve is None:
            self._reserve = sum(map(self._estimate.to_come, self._running))
        num_left = list(map(_num_left, (*self._running.prefilling, state)))
        return self._memory.has_room(num_left, int(self._reserve + self._estimate.to_come(state)))

    def _preempt(self, head: RequestState) -> None:
        """The head of the queue has to wait: retract a running request of a priority that is low enough."""
        gap = self._options.preemption_gap
        if not self._options.priorities or gap is None or self._running.leaving:
            return
        candidates = self._running.retractable
        if candidates:
            victim = max(candidates, key=self._last_in_line)
            if self._precedence.now(victim) - self._precedence.of(head.request) >= gap:
                self.num_preemptions += 1
                self.retract(victim)

    def _plan_chunk(self, state: RequestState, budget: int, step: Step) -> int:
        """The next stretch of one prompt, at most `budget` tokens. Returns its length, 0 if it has to wait."""
        self._memory.reuse(state, idle=state.last_step <= self._running.applied)
        start, end = state.kv_len, min(state.prefill_end, state.kv_len + budget)
        if end < state.prefill_end:
            end -= end % self._memory.unit
        if end <= start or not self._memory.grow(state, end):
            return 0
        self._grant(state, step)
        samples = end == state.prefill_end and end < state.max_tokens
        chunk = state.chunk(start, end, samples=samples)
        step.chunks.append(chunk)
        if chunk.scored_ids:
            step.scoring.append(state)
        if samples:
            step.rows.append(state)
        else:
            step.silent[state] = end
        state.kv_len = end
        state.last_step = step.step_id
        node = self._memory.publish(state, start, step.step_id)
        if node is not None:
            step.published.append(node)
        self._running.place(state)
        return end - start

    def _grant(self, state: RequestState, step: Step) -> None:
        first = state.num_granted
        for group, page_ids in enumerate(state.pages):
            begin = max(first, state.floors[group])
            new = tuple(page_ids[begin:])
            step.grants.append(PageGrant(slot=state.slot, group=group, first=begin, page_ids=new))
        state.num_granted = len(state.pages[0])

    def _relieve(self) -> bool:
        """Pages are short: retract the youngest request; one that is alone fails. False if pages will come anyway."""
        if self._running.leaving or self._running.ending:
            return False
        # Nobody runs: a retracted head of the queue may have grown beyond the pool, on pages that it shared.
        head = self._queue.head()
        candidates = self._running.retractable or ([] if head is None else [head])
        if not candidates:
            return False
        victim = max(candidates, key=self._last_in_line)
        if len(candidates) > 1:
            self.retract(victim)
            return True
        if victim.last_step > self._running.applied:
            return False  # what is in flight may end it
        needed, total = max(victim.kv_len + 1, victim.prefill_end), self._memory.max_total_tokens
        message = (
            f"the request needs keys and values of {needed} tokens, but the cache holds max_total_tokens={total}; "
            "raise --max-total-tokens or ask for fewer new tokens"
        )
        self._finish(victim, Finish(type="abort", message=message, status=500))
        return True

    def _last_in_line(self, state: RequestState) -> tuple[float, int]:
        return self._precedence.now(state), state.arrival

    def retract(self, state: RequestState) -> None:
        """Send a running request back to the queue's front; it will compute its tokens so far again."""
        state.status = Status.WAITING
        state.since = None
        state.num_retractions += 1
        self.num_retractions += 1
        self._queue.push_back(state)
        self._running.leave(state)
