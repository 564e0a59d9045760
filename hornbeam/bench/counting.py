"""An engine without a model, to measure the server alone: the real loop and scheduler, over steps that take a set time.

The generated ids are made up. Runs in the engine process of a real server; see `bench/live.py`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hornbeam.config.components import CacheOptions, LoopOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.engine.envelope import Ready
from hornbeam.engine.parts import Built
from hornbeam.scheduler.scheduler import Scheduler

STEP_SECONDS = 0.04
CONTEXT_LEN = 4096
PAGE_SIZE = 16
NUM_PAGES = 8193  # soon full of prefixes, so that a long run tells what memory it takes in the end
VOCAB_SIZE = 10_000  # ids that any tokenizer of use has
MAX_RUNNING = 512


@dataclass(frozen=True, slots=True)
class CountedStep:
    """Done at a point in time."""

    answer: StepResult
    done_at: float

    def wait(self, timeout: float | None = None) -> bool:
        """See `PendingStep`."""
        left = self.done_at - time.monotonic()
        if left > 0:
            time.sleep(left if timeout is None else min(left, timeout))
        return time.monotonic() >= self.done_at

    def result(self) -> StepResult:
        """See `PendingStep`."""
        self.wait()
        return self.answer


class CountingExecutor:
    """Each slot counts through the vocabulary."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> CountedStep:
        """See `Executor`."""
        self._free_at = max(self._free_at, time.monotonic()) + STEP_SECONDS
        ids = tuple((1000 + (plan.step_id * 7 + slot) % (VOCAB_SIZE - 1000),) for slot in plan.sampling_slots)
        return CountedStep(StepResult(step_id=plan.step_id, token_ids=ids), self._free_at)


def build_engine(user: Mapping[str, Any]) -> Built:
    """The engine; flags are ignored."""
    scheduler = Scheduler(
        SchedulerOptions(max_running_requests=MAX_RUNNING, max_queued_requests=None, chunked_prefill_size=8192, seed=0),
        CacheOptions(page_size=PAGE_SIZE, max_total_tokens=None, memory_fraction=0.5, radix=True),
        specs=(CacheSpec(kind="full", layers=(0,), row_shapes=((1, 1),) * 2, dtype="float32"),),
        num_pages=(NUM_PAGES,),
        context_len=CONTEXT_LEN,
        eos_ids=frozenset(),
    )
    ready = Ready(
        context_len=CONTEXT_LEN,
        vocab_size=1_000_000,
        max_total_tokens=(NUM_PAGES - 1) * PAGE_SIZE,
        max_running_requests=MAX_RUNNING,
        facts={"architectures": ["Counting"], "device_name": "none"},
    )
    return Built(scheduler=scheduler, executor=CountingExecutor(), ready=ready, options=LoopOptions())
