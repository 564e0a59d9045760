"""The real scheduler on a pretended GPU: what a policy does to throughput, waiting times and cache hits. No torch.

Sessions of several turns share system prompts; a turn is sent when the answer to the one before has come and the user
has thought. A step takes as long as a cost model says: the larger of the time to read weights and cached rows, and the
time to compute its tokens.
"""

import heapq
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from hornbeam.config.components import CacheOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.core.request import Request, RequestOutput, SamplingParams
from hornbeam.scheduler.scheduler import Scheduler

PAGE_SIZE = 16
VOCAB_SIZE = 100_000
SPEC = CacheSpec(kind="full", layers=(0,), row_shapes=((1, 1),) * 2, dtype="bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a step; the defaults are near an 8B model in bf16 on an H200."""

    bytes_of_weights: float = 16e9
    bytes_per_token: float = 131_072  # of a cached row, all layers
    flops_per_token: float = 16e9
    bytes_per_second: float = 4.3e12
    flops_per_second: float = 7.9e14
    seconds_per_step: float = 0.0005  # launches

    def seconds(self, plan: StepPlan) -> float:
        """How long `plan` takes."""
        num_read = sum(plan.decode_lens) + sum(chunk.start + len(chunk.token_ids) for chunk in plan.chunks)
        reading = (self.bytes_of_weights + num_read * self.bytes_per_token) / self.bytes_per_second
        computing = plan.num_tokens * self.flops_per_token / self.flops_per_second
        return self.seconds_per_step + max(reading, computing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """The load. Lengths are means of what is drawn, in tokens."""

    num_sessions: int = 500
    num_turns: int = 5
    num_system_prompts: int = 50
    system_tokens: int = 2000
    question_tokens: int = 60
    answer_tokens: int = 120
    sessions_per_second: float = 200.0
    thinking_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.num_sessions < 1 or self.num_turns < 1:
            raise ConfigError("a simulation needs at least one session of one turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run was like. Waiting is the time from sending a turn to its first token, in seconds."""

    policy: str
    num_requests: int
    seconds: float
    output_tokens_per_second: float
    hit_rate: float  # of the prompt tokens
    median_wait: float
    p99_wait: float
    longest_wait: float
    num_retractions: int


def run_simulations(policies: Sequence[str], load: Sessions, num_tokens: int, seed: int = 0) -> Iterator[str]:
    """The lines to print: a table, then a JSON line per policy. `num_tokens`: size of the key-value cache."""
    yield f"{'policy':<12} {'tok/s out':>10} {'hit rate':>9} {'wait p50':>9} {'p99':>8} {'max':>8} {'retracted':>10}"
    outcomes = []
    for policy in policies:
        outcome = Simulation(policy, load, num_tokens, seed).run()
        outcomes.append(outcome)
        yield (
            f"{outcome.policy:<12} {outcome.output_tokens_per_second:>10.0f} {outcome.hit_rate:>9.3f} "
            f"{outcome.median_wait:>8.2f}s {outcome.p99_wait:>7.2f}s {outcome.longest_wait:>7.2f}s "
            f"{outcome.num_retractions:>10}"
        )
    yield from (json.dumps({"benchmark": "simulate", **asdict(outcome)}) for outcome in outcomes)


class Simulation:
    """One policy under one load; the same seed draws the same load for every policy."""

    def __init__(self, policy: str, load: Sessions, num_tokens: int, seed: int) -> None:
        self._policy, self._load, self._cost = policy, load, CostModel()
        self._draw = random.Random(seed)
        self._scheduler = Scheduler(
            SchedulerOptions(
                max_running_requests=256, max_queued_requests=None, chunked_prefill_size=8192, seed=seed, policy=policy
            ),
            CacheOptions(page_size=PAGE_SIZE, max_total_tokens=None, memory_fraction=1.0, radix=True),
            specs=(SPEC,),
            num_pages=(num_tokens // PAGE_SIZE + 1,),
            context_len=2**20,
            eos_ids=frozenset(),
            vocab_size=VOCAB_SIZE,
        )
        self._now = 0.0
        self._turns: list[tuple[float, str, tuple[int, ...], int]] = []  # to be sent: (when, id, prompt, new tokens)
        self._scripts: dict[str, list[tuple[float, tuple[int, ...], int]]] = {}  # session -> turns to come
        self._prompts: dict[str, tuple[int, ...]] = {}  # of the requests in flight
        self._answers: dict[str, list[int]] = {}
        self._sent_at: dict[str, float] = {}
        self._waits: list[float] = []
        self._write_scripts()

    def run(self) -> Outcome:
        """Serve every session to its end."""
        while self._turns or self._scheduler.has_work:
            self._send_what_is_due()
            plan = self._scheduler.plan()
            if plan is None:
                self._now = self._turns[0][0]
                continue
            self._now += self._cost.seconds(plan)
            ids = tuple((self._draw.randrange(VOCAB_SIZE),) for _ in range(plan.num_samples))
            self._scheduler.apply(StepResult(step_id=plan.step_id, token_ids=ids))
            for output in self._scheduler.drain():
                self._receive(output)
        stats = self._scheduler.stats()
        waits = sorted(self._waits)
        return Outcome(
            policy=self._policy,
            num_requests=len(waits),
            seconds=self._now,
            output_tokens_per_second=stats.total_generated_tokens / self._now,
            hit_rate=stats.total_cached_tokens / stats.total_prompt_tokens,
            median_wait=statistics.median(waits),
            p99_wait=waits[len(waits) * 99 // 100],
            longest_wait=waits[-1],
            num_retractions=stats.total_retractions,
        )

    def _write_scripts(self) -> None:
        load, draw = self._load, self._draw
        systems = [self._tokens(load.system_tokens) for _ in range(load.num_system_prompts)]
        start = 0.0
        for session in range(load.num_sessions):
            start += draw.expovariate(load.sessions_per_second)
            turns = []
            for _ in range(load.num_turns):
                thinking = draw.expovariate(1 / load.thinking_seconds)
                turns.append((thinking, self._tokens(load.question_tokens), self._length(load.answer_tokens)))
            _, question, num_new = turns.pop(0)
            self._scripts[str(session)] = turns
            heapq.heappush(self._turns, (start, str(session), draw.choice(systems) + question, num_new))

    def _tokens(self, mean: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(VOCAB_SIZE) for _ in range(self._length(mean)))

    def _length(self, mean: int) -> int:
        return self._draw.randint(mean // 2 + 1, mean * 3 // 2)

    def _send_what_is_due(self) -> None:
        while self._turns and self._turns[0][0] <= self._now:
            when, session, prompt, num_new = heapq.heappop(self._turns)
            self._prompts[session], self._answers[session], self._sent_at[session] = prompt, [], when
            sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
            self._scheduler.submit(Request(rid=session, prompt_ids=prompt, sampling=sampling))

    def _receive(self, output: RequestOutput) -> None:
        session = output.rid
        answer = self._answers[session]
        if not answer and output.token_ids:
            self._waits.append(self._now - self._sent_at[session])
        answer += output.token_ids
        if output.finish is not None and self._scripts[session]:
            thinking, question, num_new = self._scripts[session].pop(0)
            prompt = (*self._prompts[session], *answer, *question)
            heapq.heappush(self._turns, (self._now + thinking, session, prompt, num_new))
