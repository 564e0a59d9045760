"""What scheduling costs, without a model: planning a decode step, and finding a prompt's prefix in a large tree."""

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator

from hornbeam.cache.pages import PagePool
from hornbeam.cache.prefix import PrefixTree
from hornbeam.config.components import CacheOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.core.request import Request, SamplingParams
from hornbeam.scheduler.scheduler import Scheduler

BATCH_SIZES = (64, 128, 256, 512)
NUM_NODES = (1_000, 10_000, 100_000)
PROMPT_TOKENS = 8_000
PAGE_SIZE = 16
REPEATS = 200
SPEC = CacheSpec(kind="full", layers=(0,), row_shapes=((1, 1),) * 2, dtype="bfloat16")


def run_scheduler_benchmark() -> Iterator[str]:
    """The lines to print: a table, then one JSON line."""
    decode = {size: _decode_step_ms(size) for size in BATCH_SIZES}
    match = {size: _match_ms(size) for size in NUM_NODES}
    yield "planning a decode step (median)"
    yield from (f"  {size:>7} requests  {ms:8.3f} ms" for size, ms in decode.items())
    yield f"matching a prompt of {PROMPT_TOKENS} tokens (median)"
    yield from (f"  {size:>7} nodes     {ms:8.3f} ms" for size, ms in match.items())
    yield json.dumps({"benchmark": "scheduler", "decode_step_ms": decode, "match_ms": match})


def _decode_step_ms(num_requests: int) -> float:
    """The median, with all requests running; those whose page is full get a new one, as in real life."""
    scheduler = Scheduler(
        SchedulerOptions(
            max_running_requests=num_requests, max_queued_requests=None, chunked_prefill_size=2**20, seed=0
        ),
        CacheOptions(page_size=PAGE_SIZE, max_total_tokens=None, memory_fraction=1.0, radix=True),
        specs=(SPEC,),
        num_pages=(num_requests * 40,),
        context_len=1024,
        eos_ids=frozenset(),
    )
    sampling = SamplingParams(max_new_tokens=REPEATS + 10)
    for index in range(num_requests):
        prompt_ids = tuple(range(index, index + 100 + index % PAGE_SIZE))
        scheduler.submit(Request(rid=str(index), prompt_ids=prompt_ids, sampling=sampling))
    times: list[float] = []
    plan = scheduler.plan()
    while plan is not None and len(times) < REPEATS:
        scheduler.apply(_answer(plan))
        scheduler.drain()
        started = time.perf_counter()
        plan = scheduler.plan()
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1000, 4)


def _answer(plan: StepPlan) -> StepResult:
    return StepResult(step_id=plan.step_id, token_ids=((1,),) * plan.num_samples)


def _match_ms(num_nodes: int) -> float:
    """The median, in a tree of prompts that branch off each other at random places."""
    draw = random.Random(0)
    pool = PagePool(num_nodes * 12 + 2 * PROMPT_TOKENS)
    tree = PrefixTree((pool,), PAGE_SIZE, PAGE_SIZE)
    shared = [draw.randrange(100_000) for _ in range(PROMPT_TOKENS)]
    ends = range(PAGE_SIZE, PROMPT_TOKENS + 1, PAGE_SIZE)
    for index in range(num_nodes // 2):  # a prompt adds a leaf, and mostly cuts another node in two
        tail = [draw.randrange(100_000) for _ in range(PAGE_SIZE * draw.randint(1, 20))]
        start = draw.choice(ends) if index else PROMPT_TOKENS
        tokens = shared[:start] + tail
        match = tree.match(tree.root(""), tokens, len(tokens))
        num_pages = (len(tokens) - match.length) // PAGE_SIZE
        tree.extend(match.node, tokens, len(tokens), [pool.allocate(num_pages) or []])
    return _median_ms(lambda: tree.match(tree.root(""), shared, PROMPT_TOKENS))


def _median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1000, 4)
