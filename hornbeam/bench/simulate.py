"""The real scheduler on a pretended GPU: what a policy does to throughput, waiting times and cache hits. No torch.

A load is a number of conversations, drawn or recorded; a turn is sent when the answer to the one before has come and
the user has thought. A step takes as long as a cost model says: the larger of the time to read weights and cached
rows, and the time to compute its tokens.
"""

import heapq
import json
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hornbeam.config.components import CacheOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.core.request import Request, RequestOutput, SamplingParams
from hornbeam.scheduler.record import Entry, Submitted, replay
from hornbeam.scheduler.scheduler import Scheduler

PAGE_SIZE = 16
VOCAB_SIZE = 1_000_000
SPEC = CacheSpec(kind="full", layers=(0,), row_shapes=((1, 1),) * 2, dtype="bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of a step; the defaults are near an 8B model in bf16 on an H200."""

    bytes_of_weights: float = 16e9
    bytes_per_token: float = 131_072  # of a cached row, all layers
    flops_per_token: float = 16e9
    flops_per_pair: float = 524_288  # of a query and a key, all layers
    bytes_per_second: float = 4.3e12
    flops_per_second: float = 7.9e14
    seconds_per_step: float = 0.0005  # launches

    def seconds(self, plan: StepPlan) -> float:
        """How long `plan` takes."""
        num_read = sum(plan.decode_lens) + sum(chunk.start + len(chunk.token_ids) for chunk in plan.chunks)
        num_pairs = sum(len(chunk.token_ids) * (chunk.start + len(chunk.token_ids) / 2) for chunk in plan.chunks)
        reading = (self.bytes_of_weights + num_read * self.bytes_per_token) / self.bytes_per_second
        computing = plan.num_tokens * self.flops_per_token + num_pairs * self.flops_per_pair
        return self.seconds_per_step + max(reading, computing / self.flops_per_second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What is sent `delay` seconds after the answer before it (the first: after the start), and what will be answered.

    The prompt is the conversation so far and `question`.
    """

    delay: float
    question: tuple[int, ...]
    answer: tuple[int, ...]


Load = Sequence[Sequence[Turn]]  # conversations


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Many users whose sessions share system prompts. Lengths are means of what is drawn, in tokens."""

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

    def draw(self, seed: int) -> Load:
        """The same seed draws the same load."""
        chance = random.Random(seed)
        systems = [_draw(chance, self.system_tokens) for _ in range(self.num_system_prompts)]
        start, load = 0.0, []
        for _ in range(self.num_sessions):
            start += chance.expovariate(self.sessions_per_second)
            delays = [start, *(chance.expovariate(1 / self.thinking_seconds) for _ in range(self.num_turns - 1))]
            heads = [chance.choice(systems), *((),) * (self.num_turns - 1)]
            load.append(
                [
                    Turn(
                        delay=delay,
                        question=head + _draw(chance, self.question_tokens),
                        answer=_draw(chance, self.answer_tokens),
                    )
                    for delay, head in zip(delays, heads, strict=True)
                ]
            )
        return load


def streams_and_a_long_prompt(num_streams: int = 32, num_tokens: int = 32_000, seed: int = 0) -> Load:
    """Streams that run, and a second later one long prompt."""
    chance = random.Random(seed)
    streams = [[Turn(delay=0.0, question=_draw(chance, 500), answer=_draw(chance, 1500))] for _ in range(num_streams)]
    prompt = tuple(chance.randrange(VOCAB_SIZE) for _ in range(num_tokens))
    return [*streams, [Turn(delay=1.0, question=prompt, answer=_draw(chance, 100))]]


def burst(num_requests: int = 512, seed: int = 0) -> Load:
    """All at once, with prompts and answers of about 560 tokens: only throughput counts."""
    chance = random.Random(seed)
    return [[Turn(delay=0.0, question=_draw(chance, 560), answer=_draw(chance, 560))] for _ in range(num_requests)]


def recorded(entries: Iterable[Entry]) -> Load:
    """The requests of a record, when they came, and what they really generated."""
    arrivals: dict[str, Submitted] = {}
    answers: dict[str, list[int]] = {}

    def watched() -> Iterator[Entry]:
        for entry in entries:
            if isinstance(entry, Submitted):
                arrivals[entry.request.rid] = entry
            yield entry

    def note(output: RequestOutput) -> None:
        answers.setdefault(output.rid, []).extend(output.token_ids)

    replay(watched(), note)
    start = min((entry.at for entry in arrivals.values()), default=0.0)
    return [
        [Turn(delay=entry.at - start, question=entry.request.prompt_ids, answer=tuple(answers[rid]))]
        for rid, entry in arrivals.items()
        if answers.get(rid)
    ]


def _draw(chance: random.Random, mean: int) -> tuple[int, ...]:
    return tuple(chance.randrange(VOCAB_SIZE) for _ in range(chance.randint(mean // 2 + 1, mean * 3 // 2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run was like. Times in seconds; waiting is the time from sending a turn to its first token."""

    policy: str
    num_requests: int
    seconds: float
    output_tokens_per_second: float
    hit_rate: float  # of the prompt tokens
    median_wait: float
    p99_wait: float
    longest_wait: float
    median_gap: float  # between two tokens of a stream
    p99_gap: float
    num_retractions: int


def run_simulations(policies: Sequence[str], load: Load, num_tokens: int, **options: int) -> Iterator[str]:
    """The lines to print: a table, then a JSON line per policy. `num_tokens`: size of the key-value cache."""
    yield (
        f"{'policy':<12} {'tok/s out':>10} {'hit rate':>9} {'wait p50':>9} {'p99':>8} {'max':>8} "
        f"{'gap p50':>9} {'p99':>9} {'retracted':>10}"
    )
    outcomes = []
    for policy in policies:
        outcome = Simulation(policy, load, num_tokens, **options).run()
        outcomes.append(outcome)
        yield (
            f"{outcome.policy:<12} {outcome.output_tokens_per_second:>10.0f} {outcome.hit_rate:>9.3f} "
            f"{outcome.median_wait:>8.2f}s {outcome.p99_wait:>7.2f}s {outcome.longest_wait:>7.2f}s "
            f"{outcome.median_gap * 1e3:>7.1f}ms {outcome.p99_gap * 1e3:>7.1f}ms {outcome.num_retractions:>10}"
        )
    yield from (json.dumps({"benchmark": "simulate", **asdict(outcome)}) for outcome in outcomes)


class Simulation:
    """One policy under one load. `options` are fields of `SchedulerOptions`."""

    def __init__(self, policy: str, load: Load, num_tokens: int, **options: int) -> None:
        self._policy, self._load, self._cost = policy, load, CostModel()
        limits: dict[str, Any] = {"max_running_requests": 256, "chunked_prefill_size": 8192, "seed": 0} | options
        self._scheduler = Scheduler(
            SchedulerOptions(max_queued_requests=None, policy=policy, **limits),
            CacheOptions(page_size=PAGE_SIZE, max_total_tokens=None, memory_fraction=1.0, radix=True),
            specs=(SPEC,),
            num_pages=(num_tokens // PAGE_SIZE + 1,),
            context_len=2**20,
            eos_ids=frozenset(),
        )
        self._now = 0.0
        self._due = [(turns[0].delay, number) for number, turns in enumerate(load)]  # (when, conversation)
        heapq.heapify(self._due)
        self._turns = [0] * len(load)  # per conversation: the turn it has reached
        self._texts: list[tuple[int, ...]] = [()] * len(load)  # of the turns that have been sent
        self._num_answered = [0] * len(load)  # tokens of the present turn
        self._slots: dict[int, int] = {}  # -> conversation
        self._sent_at = [0.0] * len(load)
        self._heard_at = [0.0] * len(load)
        self._waits: list[float] = []
        self._gaps: list[float] = []

    def run(self) -> Outcome:
        """Serve every conversation to its end."""
        while self._due or self._scheduler.has_work:
            self._send_what_is_due()
            plan = self._scheduler.plan()
            if plan is None:
                self._now = self._due[0][0]
                continue
            seconds = self._cost.seconds(plan)
            self._now += seconds
            self._scheduler.apply(StepResult(step_id=plan.step_id, token_ids=self._sample(plan)), seconds)
            for output in self._scheduler.drain():
                self._receive(output)
        stats = self._scheduler.stats()
        waits, gaps = sorted(self._waits), sorted(self._gaps) or [0.0]
        return Outcome(
            policy=self._policy,
            num_requests=len(waits),
            seconds=self._now,
            output_tokens_per_second=stats.total_generated_tokens / self._now,
            hit_rate=stats.total_cached_tokens / stats.total_prompt_tokens,
            median_wait=statistics.median(waits),
            p99_wait=waits[len(waits) * 99 // 100],
            longest_wait=waits[-1],
            median_gap=statistics.median(gaps),
            p99_gap=gaps[len(gaps) * 99 // 100],
            num_retractions=stats.total_retractions,
        )

    def _send_what_is_due(self) -> None:
        while self._due and self._due[0][0] <= self._now:
            when, number = heapq.heappop(self._due)
            turn = self._load[number][self._turns[number]]
            self._texts[number] += turn.question
            self._num_answered[number], self._sent_at[number] = 0, when
            # The seed tells whose tokens a slot is to sample.
            sampling = SamplingParams(max_new_tokens=len(turn.answer), ignore_eos=True, seed=number)
            self._scheduler.submit(
                Request(rid=str(number), prompt_ids=self._texts[number], sampling=sampling, streamed=True)
            )

    def _sample(self, plan: StepPlan) -> tuple[tuple[int, ...], ...]:
        for start in plan.starts:
            self._slots[start.slot] = start.seed
        rows = []
        for slot in (*plan.decode, *(chunk.slot for chunk in plan.chunks if chunk.samples)):
            number = self._slots[slot]
            rows.append((self._load[number][self._turns[number]].answer[self._num_answered[number]],))
            self._num_answered[number] += 1
        return tuple(rows)

    def _receive(self, output: RequestOutput) -> None:
        number = int(output.rid)
        if output.num_generated == 1:
            self._waits.append(self._now - self._sent_at[number])
        elif output.token_ids:
            self._gaps.append(self._now - self._heard_at[number])
        self._heard_at[number] = self._now
        if output.finish is not None:
            self._texts[number] += self._load[number][self._turns[number]].answer
            self._turns[number] += 1
            if self._turns[number] < len(self._load[number]):
                heapq.heappush(self._due, (self._now + self._load[number][self._turns[number]].delay, number))
