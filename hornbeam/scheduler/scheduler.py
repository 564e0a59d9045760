"""Who runs when: requests and results in, step plans and outputs out.

Steps overlap: `plan` may be called again before the results of earlier plans were applied. Planning therefore
works with upper bounds (`kv_len`), which it never lets pass the ends that are known in advance; a stop is found when
a result is applied, and what later steps in flight yield for that request is dropped.

Requests come, end and are told of here; `planning` says what a step does, `waiting` who is next, `memory` owns pages.
Knows no text, no tensors and no model: token ids, page numbers, budgets.
"""

import random
from collections import deque
from typing import Literal

from hornbeam.cache.node import PrefixListener
from hornbeam.config.components import CacheOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import BadRequest, Overloaded
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.core.request import Finish, Request, RequestOutput, Status
from hornbeam.scheduler.memory import Memory, Running
from hornbeam.scheduler.planning import OutputEstimate, Planner
from hornbeam.scheduler.policies import Surroundings
from hornbeam.scheduler.sharing import Sharing
from hornbeam.scheduler.state import RequestState, Step
from hornbeam.scheduler.stats import SchedulerStats
from hornbeam.scheduler.waiting import Limits, Precedence, WaitingQueue

PauseMode = Literal["in_place", "retract", "abort"]


class Scheduler:
    """Owner of the truth about every request.

    Args:
        options: limits and policy.
        cache: page size, and whether prefixes are reused.
        specs: the cache groups, of kind "full" or "window".
        num_pages: per group, the padding page 0 included.
        context_len: prompt and generated tokens of one request, at most.
        eos_ids: ids that end a request unless it ignores them.

    Raises:
        ConfigError: a cache kind that is not implemented, or a pool without pages.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        cache: CacheOptions,
        *,
        specs: tuple[CacheSpec, ...],
        num_pages: tuple[int, ...],
        context_len: int,
        eos_ids: frozenset[int],
    ) -> None:
        self._options = options
        self._memory = Memory(
            specs,
            num_pages,
            cache,
            num_slots=options.max_running_requests,
            chunk_size=options.chunked_prefill_size,
        )
        self._limits = Limits(context_len=context_len, max_total_tokens=self._memory.max_total_tokens)
        self._estimate = OutputEstimate(options.conservativeness)
        self._eos_ids = eos_ids
        self._random = random.Random(options.seed)
        self._states: dict[str, RequestState] = {}  # all that have not finished
        self._running = Running(self._memory)
        around, precedence = Surroundings(self._memory.known_prefix, self._running), Precedence(options)
        self._queue = WaitingQueue(options.policy, around, precedence, options.seed)
        self._planner = Planner(
            options, self._memory, self._queue, self._running, self._estimate, precedence, self._finish
        )
        self._sharing = Sharing()
        self._in_flight: deque[Step] = deque()
        self._num_planned = 0  # steps, and so the next step's id
        self._paused = False
        self._some_had_to_wait = False  # at the latest plan
        self._news: dict[RequestState, None] = {}
        self._num_submitted = 0
        self._total_prompt = self._total_cached = self._total_generated = 0
        self._total_finished = self._total_aborted = self._total_refused = self._total_mixed_steps = 0

    # What is going on.

    @property
    def num_running(self) -> int:
        """Requests that hold a slot and have not finished."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Queued requests, retracted ones included."""
        return len(self._queue)

    @property
    def paused(self) -> bool:
        """Whether nothing is planned until `resume`."""
        return self._paused

    @property
    def has_work(self) -> bool:
        """Some request has not finished, or some result is still to come."""
        return bool(self._states or self._in_flight)

    def stats(self) -> SchedulerStats:
        """A snapshot."""
        memory = self._memory
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_used_tokens=memory.max_total_tokens - memory.num_available_tokens,
            num_cached_tokens=memory.num_cached_tokens,
            max_total_tokens=memory.max_total_tokens,
            total_prompt_tokens=self._total_prompt,
            total_cached_tokens=self._total_cached,
            total_generated_tokens=self._total_generated,
            total_retractions=self._planner.num_retractions,
            total_preemptions=self._planner.num_preemptions,
            total_requests=self._num_submitted,
            total_finished=self._total_finished,
            total_aborted=self._total_aborted,
            total_refused=self._total_refused,
            total_steps=self._num_planned,
            total_mixed_steps=self._total_mixed_steps,
            total_evicted_pages=memory.num_evicted_pages,
            decode_step_seconds=self._planner.pace.decode_seconds,
            mixed_step_tokens=self._planner.pace.max_prompt_tokens or 0,
        )

    def listen(self, listener: PrefixListener) -> None:
        """Tell `listener` what enters the prefix tree and leaves it, from now on. Of no effect on what is planned."""
        self._memory.listen(listener)

    def check(self) -> None:
        """Verify that every page, slot and lock is held by someone who runs. Raises AssertionError with details."""
        holders = [*self._running, *self._running.leaving]
        assert self.has_work or not holders, f"idle, but {len(holders)} requests hold memory"
        self._memory.check(holders)

    # Commands.

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            BadRequest: it can never be served; the message has the numbers.
            Overloaded: the queue is full.
        """
        num_prompt, sampling = len(request.prompt_ids), request.sampling
        if request.rid in self._states:
            raise BadRequest(f"a request with id {request.rid!r} is in flight already; ids must be unique", "rid")
        self._limits.check(request)
        self._refuse_if_full(request)
        room = self._limits.context_len - num_prompt
        max_new_tokens = room if sampling.max_new_tokens is None else min(sampling.max_new_tokens, room)
        eos_ids = frozenset() if sampling.ignore_eos else self._eos_ids
        state = RequestState(
            request=request,
            seed=self._random.getrandbits(63) if sampling.seed is None else sampling.seed,
            arrival=self._num_submitted,
            max_tokens=num_prompt + max_new_tokens,
            stop_ids=eos_ids.union(sampling.stop_token_ids) if sampling.stop_token_ids else eos_ids,
        )
        self._num_submitted += 1
        self._states[request.rid] = state
        self._queue.push(state)

    def abort(self, rid: str, *, keep_tokens: int | None = None, message: str = "Aborted") -> None:
        """End a request wherever it stands; an unknown `rid` (it may have just finished) is ignored.

        Args:
            rid: the exact id.
            keep_tokens: the text session found a stop string and has finished the request by itself, with this
                many generated tokens: the truth is cut there, and no output follows.
            message: told to the client.
        """
        state = self._states.get(rid)
        if state is None:
            return
        if keep_tokens is not None:
            del state.tokens[state.num_prompt + keep_tokens :]
            self._finish(state, Finish(type="stop"))
            del self._news[state]
        else:
            self._finish(state, Finish(type="abort", message=message))

    def abort_all(self) -> None:
        """Abort every request."""
        for state in list(self._states.values()):
            self._finish(state, Finish(type="abort", message="Aborted"))

    def pause(self, mode: PauseMode) -> None:
        """Plan nothing until `resume`. Steps in flight end as usual, and requests may be submitted and aborted.

        Args:
            mode: what becomes of the running requests: "in_place", they keep their memory; "retract", they wait, and
                what they need will be computed again or found in the tree; "abort": all requests end.
        """
        self._paused = True
        if mode == "abort":
            self.abort_all()
        elif mode == "retract":
            for state in sorted(self._running.retractable, key=lambda state: -state.arrival):
                self._planner.retract(state)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False

    def expire(self, now: float) -> None:
        """End requests that have waited, or run, longer than the options allow. `now`: seconds, never going back."""
        limits = {Status.WAITING: self._options.waiting_timeout, Status.RUNNING: self._options.running_timeout}
        if not any(limits.values()):
            return
        for state in list(self._states.values()):
            limit = limits.get(state.status)
            if state.since is None:
                state.since = now
            if limit is not None and now - state.since > limit:
                message = f"the request was {state.status.value} for more than {limit:g} seconds"
                self._finish(state, Finish(type="abort", message=message, status=Overloaded.status))

    def flush(self) -> bool:
        """Drop the prefix cache. False (and nothing is done) while any request runs, or waits without a pause."""
        if self._in_flight or self.num_running or (len(self._queue) and not self._paused):
            return False
        self._memory.flush()
        return True

    def drain(self) -> list[RequestOutput]:
        """The news since the last call, one output per request that has any to tell (see `Request.told_each_step`)."""
        outputs = [state.output() for state in self._news]
        self._news.clear()
        return outputs

    # Planning.

    def plan(self) -> StepPlan | None:
        """The next step, or None if nothing can run before a result is applied, a request submitted or `resume`."""
        if self._paused:
            return None
        step = self._planner.plan(self._num_planned, in_flight=bool(self._in_flight))
        self._some_had_to_wait = bool(len(self._queue))
        if step.empty:
            assert self._in_flight or not self._states, "requests are left, and none of them can ever run"
            return None
        self._num_planned += 1
        self._total_mixed_steps += bool(step.decode and step.chunks)
        self._in_flight.append(step)
        return StepPlan(
            step_id=step.step_id,
            starts=tuple(step.starts),
            grants=tuple(step.grants),
            decode=tuple(step.decode),
            decode_lens=tuple(step.decode_lens),
            shared=self._sharing.find(step.rows[: len(step.decode)]) if len(step.decode) > 1 else (),
            chunks=tuple(step.chunks),
        )

    # Results.

    def apply(self, result: StepResult, seconds: float | None = None) -> None:
        """Take the result of the oldest step in flight; `seconds`: how long it kept the device. Linear in its rows."""
        step = self._in_flight.popleft()
        assert result.step_id == step.step_id, f"result of step {result.step_id}, expected {step.step_id}"
        self._running.applied = step.step_id
        if result.error is not None:
            self._fail(step, result.error)
        else:
            self._accept(step, result)
            if seconds is not None:
                self._planner.pace.learn(len(step.decode), step.num_prompt_tokens, seconds)
        if self._memory.has_windows:
            self._leave_behind(step)
        self._running.release_left()

    def _accept(self, step: Step, result: StepResult) -> None:
        for state, scores in zip(step.scoring, result.input_logprobs, strict=True):
            state.accept_scores(scores)
        logprobs = result.logprobs or ((),) * len(step.rows)
        for state, token_ids, entries in zip(step.rows, result.token_ids, logprobs, strict=True):
            if state.status is Status.FINISHED:
                continue  # found out late: another step was already on its way
            self._total_generated += len(token_ids)
            finish = state.accept(token_ids, entries)
            if finish is not None:
                self._finish(state, finish)
            elif state.request.told_each_step or not state.num_reported:
                self._news[state] = None
        for state in step.silent:
            if state.last_step == step.step_id and state in self._running.ending:
                self._finish(state, Finish(type="length", length=0))

    def _leave_behind(self, step: Step) -> None:
        """Pages behind the windows go back once the step that last reads them is done."""
        for state in (*step.rows, *step.silent):
            if state.status is Status.RUNNING and state.node is not None:
                if state.last_step == step.step_id:
                    num_done = state.kv_len
                else:  # a row of a later step stands for the last token
                    num_done = step.silent.get(state, len(state.tokens) - 1)
                self._memory.leave_behind(state, num_done)

    def _fail(self, step: Step, error: str) -> None:
        """Nothing that `step` wrote is valid: end its requests, and those that reuse what it wrote."""
        for node in step.published:
            self._memory.revoke(node)  # and what later steps have added below
        broken = dict.fromkeys((*step.rows, *step.silent))
        for state in (*self._running, *self._running.leaving):
            if state.node is not None and state.node.revoked:
                broken[state] = None
        for state in broken:
            state.kv_len = 0  # nothing of it goes into the tree
            if state.status is not Status.FINISHED:
                self._finish(state, Finish(type="abort", message=f"the step failed: {error}", status=500))

    def _finish(self, state: RequestState, finish: Finish) -> None:
        if state.status is Status.WAITING:
            self._queue.remove(state)
        if finish.type == "abort":
            self._total_aborted += 1
        else:
            self._total_finished += 1
            self._estimate.learn(len(state.tokens) - state.num_prompt)
        self._total_prompt += state.num_prompt
        self._total_cached += state.num_cached
        state.status = Status.FINISHED
        state.finish = finish
        del self._states[state.request.rid]
        self._news[state] = None
        self._running.leave(state)

    def _refuse_if_full(self, request: Request) -> None:
        """The queue is bounded. With priorities a better request takes the place of the worst one that waits."""
        limit = self._options.max_queued_requests
        if limit is None:
            return
        # Who came after a plan that left nobody waiting can start with the next one, as long as there are slots.
        ready = 0 if self._some_had_to_wait else self._memory.num_free_slots
        if len(self._queue) < limit + ready:
            return
        message = f"the request queue is full: {limit} requests are waiting (--max-queued-requests)"
        worst = self._queue.displaced_by(request)
        if worst is None:
            self._total_refused += 1
            raise Overloaded(message)
        self._finish(worst, Finish(type="abort", message=message, status=Overloaded.status))
