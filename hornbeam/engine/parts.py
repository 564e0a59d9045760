"""What an engine consists of: the parts that its loop joins, and what the loop asks of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from hornbeam.config.components import LoopOptions
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.engine.envelope import Command, Event, Ready
from hornbeam.engine.profiling import Profiler
from hornbeam.scheduler.scheduler import Scheduler


class PendingStep(Protocol):
    """A step under way."""

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is done, after at most `timeout` seconds where the device allows it."""

    def result(self) -> StepResult:
        """Block until done; raises what went wrong."""


class Executor(Protocol):
    """Runs steps in the order of their launch."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step without waiting for it."""


class Link(Protocol):
    """The engine's end of a transport."""

    def receive(self, timeout: float | None) -> Sequence[Command]:
        """The commands that have come, in order; if none has, wait for one: `timeout` seconds, or (None) for ever."""

    def send(self, event: Event) -> None:
        """Tell the server, without waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The parts of an engine."""

    scheduler: Scheduler
    executor: Executor
    ready: Ready
    options: LoopOptions
    resource: AbstractContextManager[Any] | None = None  # to be closed at the end
    profiler: Profiler | None = None
