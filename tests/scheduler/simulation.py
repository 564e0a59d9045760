"""A scheduler with a pretended device that checks every key-value row that a step reads.

In a windowed group a token reads the rows of its window, and no others: they must be in the page table, and right.
"""

from collections import deque
from dataclasses import dataclass, field
from io import BytesIO

from hornbeam.config.components import CacheOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.core.request import LogprobOptions, Request, RequestOutput, SamplingParams, TokenLogprobs
from hornbeam.scheduler.record import RecordingScheduler, read_record, replay

VOCAB, EOS = 40, 0
SPEC = CacheSpec(kind="full", layers=(0,), row_shapes=((1, 4), (1, 4)), dtype="float32")


def row_of(previous: int, token: int) -> int:
    """What a row holds: it depends on its token and on the whole history before it."""
    return hash((previous, token))


def next_token(row: int, seed: int) -> int:
    return hash((row, seed, 1)) % VOCAB


def score(token: int, options: LogprobOptions) -> TokenLogprobs:
    """Tells the token, so that a test sees which ones were scored."""
    return TokenLogprobs(chosen=-float(token), top=tuple((i, -1.0) for i in range(options.num_top)))


def reference(request: Request, context_len: int = 1000) -> tuple[tuple[int, ...], str]:
    """What a request yields if nothing else runs."""
    row, generated, sampling = 0, [], request.sampling
    for token in request.prompt_ids:
        row = row_of(row, token)
    room = context_len - len(request.prompt_ids)
    limit = room if sampling.max_new_tokens is None else min(sampling.max_new_tokens, room)
    while len(generated) < limit:
        generated.append(next_token(row, sampling.seed))
        row = row_of(row, generated[-1])
        if generated[-1] in sampling.stop_token_ids or (generated[-1] == EOS and not sampling.ignore_eos):
            return tuple(generated), "stop"
    return tuple(generated), "length"


@dataclass
class FakeDevice:
    """Runs plans in order on rows in memory. A failing step leaves garbage behind."""

    page_size: int
    windows: tuple[int | None, ...]  # per group
    rows: dict = field(default_factory=dict)  # (group, page, offset) -> row
    tables: dict = field(default_factory=dict)  # slot -> per group {entry: page}
    lens: dict = field(default_factory=dict)
    last: dict = field(default_factory=dict)
    seeds: dict = field(default_factory=dict)
    logprobs: dict = field(default_factory=dict)
    writers: dict = field(default_factory=dict)  # step in flight -> {(group, page): slot}

    def address(self, slot: int, group: int, position: int) -> tuple[int, int, int]:
        return group, self.tables[slot][group][position // self.page_size], position % self.page_size

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    def write(self, plan: StepPlan, slot: int, position: int, token: int, garbage: bool) -> None:
        full = self.windows.index(None) if None in self.windows else None
        for group, window in enumerate(self.windows):
            previous = self.rows[self.address(slot, group, position - 1)] if position else 0
            for read in range(max(0, position - window + 1), position) if window else ():
                row = self.rows[self.address(slot, group, read)]
                assert full is None or row == self.rows[self.address(slot, full, read)], "a wrong row in the window"
            address = self.address(slot, group, position)
            for pages in self.writers.values():
                assert pages.setdefault(address[:2], slot) == slot, "a page changed hands while a step may write it"
            self.rows[address] = -1 if garbage else row_of(previous, token)

    def sample(self, slot: int) -> int:
        last = {self.rows[self.address(slot, group, self.lens[slot] - 1)] for group in range(self.num_groups)}
        assert len(last) == 1, "groups differ"
        self.last[slot] = next_token(last.pop(), self.seeds[slot])
        return self.last[slot]

    def check_shared(self, plan: StepPlan) -> None:
        rows = [row for prefix in plan.shared for row in prefix.rows]
        assert len(rows) == len(set(rows)), "a row is in two groups"
        for prefix in plan.shared:
            assert len(prefix.rows) > 1
            assert 0 < prefix.num_tokens < min(plan.decode_lens[row] for row in prefix.rows)
            entries = range(prefix.num_tokens // self.page_size)
            assert prefix.num_tokens == len(entries) * self.page_size
            for group in (group for group, window in enumerate(self.windows) if window is None):
                tables = [self.tables[plan.decode[row]][group] for row in prefix.rows]
                assert len({tuple(table[entry] for entry in entries) for table in tables}) == 1, "pages differ"

    def run(self, plan: StepPlan, fail: bool = False) -> StepResult:
        self.writers[plan.step_id] = {}
        for start in plan.starts:
            self.tables[start.slot] = [{} for _ in range(self.num_groups)]
            self.lens[start.slot], self.seeds[start.slot] = start.num_cached, start.seed
            self.logprobs[start.slot] = start.logprobs
        for grant in plan.grants:
            assert 0 not in grant.page_ids, "the padding page"
            assert grant.page_ids
            self.tables[grant.slot][grant.group].update(enumerate(grant.page_ids, grant.first))
        assert len(plan.decode) == len(set(plan.decode))
        self.check_shared(plan)
        for slot, length in zip(plan.decode, plan.decode_lens, strict=True):
            assert length == self.lens[slot] + 1
            self.write(plan, slot, self.lens[slot], self.last[slot], fail)
            self.lens[slot] = length
        for chunk in plan.chunks:
            assert chunk.token_ids
            before = chunk.first_scored - 1 - chunk.start
            assert not chunk.scored_ids or 0 <= before <= len(chunk.token_ids) - len(chunk.scored_ids)
            assert chunk.start >= self.lens[chunk.slot]
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self.write(plan, chunk.slot, position, token, fail)
            self.lens[chunk.slot] = chunk.start + len(chunk.token_ids)
        sampling = (*plan.decode, *(chunk.slot for chunk in plan.chunks if chunk.samples))
        ids = tuple((self.sample(slot),) for slot in sampling)
        assert len(ids) == plan.num_samples
        if fail:
            return StepResult(step_id=plan.step_id, token_ids=(), error="device lost")
        return StepResult(
            step_id=plan.step_id,
            token_ids=ids,
            logprobs=tuple(
                () if self.logprobs[slot] is None else (score(0, self.logprobs[slot]),) for slot in sampling
            ),
            input_logprobs=tuple(
                tuple(score(token, self.logprobs[chunk.slot]) for token in chunk.scored_ids)
                for chunk in plan.chunks
                if chunk.scored_ids
            ),
        )


class Simulation:
    """A scheduler, a device, and `depth` steps in flight at most before a result is applied."""

    def __init__(
        self,
        *,
        page_size: int = 4,
        num_pages: int = 200,
        chunk: int = 16,
        slots: int = 8,
        radix: bool = True,
        depth: int = 2,
        groups: int = 1,
        windows: tuple[int | None, ...] | None = None,
        window_pages: int = 0,
        granularity: int = 1,
        context_len: int = 1000,
        queue: int | None = None,
        **options: object,
    ) -> None:
        windows = windows or (None,) * groups
        layout = {"layers": (0,), "row_shapes": ((1, 4),), "dtype": "float32", "reuse_granularity": granularity}
        self.record = BytesIO()
        self.scheduler = RecordingScheduler(
            self.record,
            options=SchedulerOptions(
                max_running_requests=slots, max_queued_requests=queue, chunked_prefill_size=chunk, seed=1, **options
            ),
            cache=CacheOptions(page_size=page_size, max_total_tokens=None, memory_fraction=0.5, radix=radix),
            specs=tuple(CacheSpec(kind="window" if size else "full", window=size, **layout) for size in windows),
            num_pages=tuple((window_pages if size else 0) or num_pages + g for g, size in enumerate(windows)),
            context_len=context_len,
            eos_ids=frozenset({EOS}),
        )
        self.device = FakeDevice(page_size=page_size, windows=windows)
        self.depth = depth
        self.results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, RequestOutput] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.input_logprobs: dict[str, list[TokenLogprobs]] = {}

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.submit(request)

    def launch(self, fail: bool = False) -> bool:
        plan = self.scheduler.plan()
        if plan is None:
            return False
        self.plans.append(plan)
        self.results.append(self.device.run(plan, fail))
        return True

    def apply(self) -> None:
        result = self.results.popleft()
        self.scheduler.apply(result)
        del self.device.writers[result.step_id]

    def drain(self) -> None:
        for output in self.scheduler.drain():
            assert output.rid not in self.ends, "news after the end"
            self.tokens.setdefault(output.rid, []).extend(output.token_ids)
            self.logprobs.setdefault(output.rid, []).extend(output.logprobs)
            self.input_logprobs.setdefault(output.rid, []).extend(output.input_logprobs)
            assert len(self.tokens[output.rid]) == output.num_generated
            if output.finish is not None:
                self.ends[output.rid] = output

    def step(self, fail: bool = False) -> bool:
        """Launch a step if one can run; apply a result if the pipeline is full or nothing could be launched."""
        launched = self.launch(fail)
        if self.results and (not launched or len(self.results) >= self.depth):
            self.apply()
        self.drain()
        return launched or bool(self.results)

    def run(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.has_work:
                break
            self.step()
            self.scheduler.check()
        assert not self.scheduler.has_work
        self.drain()
        self.scheduler.check()
        assert self.scheduler.flush()
        self.scheduler.check()
        stats = self.scheduler.stats()
        assert stats.num_used_tokens == 0
        assert stats.num_cached_tokens == 0

    def replay(self) -> None:
        """What was recorded leads to the same plans again."""
        replayed = replay(read_record(self.record.getvalue().splitlines()))
        assert replayed.stats() == self.scheduler.stats()


def make(rid: str, prompt: tuple[int, ...], max_new_tokens: int | None = 20, **options: object) -> Request:
    sampling = {"max_new_tokens": max_new_tokens, "seed": 7}
    sampling |= {key: options.pop(key) for key in ("seed", "stop_token_ids", "ignore_eos") if key in options}
    return Request(rid=rid, prompt_ids=prompt, sampling=SamplingParams(**sampling), **options)


def tokens_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(hash((seed, i, 2)) % (VOCAB - 1) + 1 for i in range(length))


def check_outputs(simulation: Simulation, requests: list[Request]) -> None:
    for request in requests:
        expected, why = reference(request)
        end = simulation.ends[request.rid]
        assert end.finish is not None
        assert (tuple(simulation.tokens[request.rid]), end.finish.type) == (expected, why), request.rid
        if why == "length":
            assert end.finish.length == len(expected)
        else:
            assert end.finish.matched == expected[-1]
        assert end.num_prompt == len(request.prompt_ids)
        check_logprobs(simulation, request, len(expected))


def check_logprobs(simulation: Simulation, request: Request, num_generated: int) -> None:
    options = request.logprobs
    assert len(simulation.logprobs[request.rid]) == (0 if options is None else num_generated)
    scored = () if options is None or options.start is None else request.prompt_ids[options.start + 1 :]
    assert tuple(-entry.chosen for entry in simulation.input_logprobs[request.rid]) == scored
