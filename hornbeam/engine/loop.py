"""The step loop: joins scheduler and executor, and answers the server's commands in between.

While the device runs step k, the loop plans and launches step k+1; then it waits for k, applies its result and sends
the news. Knows no model, no text and no transport.
"""

import dataclasses
import gc
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from hornbeam.core.errors import BadRequest, ConfigError, FamilyUnavailable, HornbeamError, Overloaded
from hornbeam.core.plan import StepResult
from hornbeam.core.request import Finish, Request, RequestOutput
from hornbeam.engine.envelope import (
    Abort,
    AbortAll,
    Command,
    Event,
    Failed,
    Flush,
    Info,
    Pause,
    Pulse,
    Reply,
    Resume,
    Shutdown,
    StartProfile,
    StepOutputs,
    StopProfile,
    Submit,
)
from hornbeam.engine.garbage import built_to_stay
from hornbeam.engine.parts import Built, Link, PendingStep
from hornbeam.engine.profiling import Profiling

logger = logging.getLogger(__name__)

COMMAND_INTERVAL = 0.005  # seconds a command may have to wait for a step, where the device allows it
IDLE_SECONDS = 1.0  # nothing to do for so long: time to check the books
MAX_FAILURES = 3  # steps in a row, after which the device counts as broken
PULSE_INTERVAL = 1.0  # seconds of silence while requests run


def run_engine(build: Callable[[], Built], link: Link) -> bool:
    """Build an engine and run it until it is told to end. False if it failed; the server has been told why."""
    try:
        built = built_to_stay(build)
        with built.resource or nullcontext():
            EngineLoop(built, link).run()
    except (ConfigError, FamilyUnavailable) as error:
        link.send(Failed(message=str(error), is_config=True))
    except Exception as error:
        logger.exception("the engine failed")
        link.send(Failed(message=f"{type(error).__name__}: {error}"))
    else:
        return True
    finally:
        gc.unfreeze()
    return False


class EngineLoop:
    """Runs on a thread of its own, which owns scheduler and executor."""

    def __init__(self, built: Built, link: Link) -> None:
        self._scheduler = built.scheduler
        self._executor = built.executor
        self._link = link
        self._ready = built.ready
        self._options = built.options
        self._profiling = Profiling(built.profiler, self._send)
        self._depth = 2 if built.options.overlap else 1  # steps under way at once
        self._steps: deque[tuple[int, PendingStep, float]] = deque()  # (step id, step, launched at), oldest first
        self._flushes: list[int] = []  # ids of the commands
        self._open = True  # takes requests
        self._num_failures = 0  # steps that failed in a row
        self._last_sent = time.monotonic()
        self._seconds = {"planning": 0.0, "steps": 0.0, "results": 0.0}
        self._step_done = 0.0  # when the latest step ended that was collected

    def run(self) -> None:
        """Serve until `Shutdown`."""
        self._send(self._ready)
        while self._open or self._scheduler.has_work:
            has_work = self._scheduler.has_work
            if self._steps or (has_work and not self._scheduler.paused):
                self._obey(timeout=0)
            elif not self._obey(timeout=IDLE_SECONDS):
                if has_work:  # paused: its clients should know that the engine lives
                    self._send(Pulse())
                else:
                    self._check()
                    self._obey(timeout=None)
            self._scheduler.expire(time.monotonic())
            if len(self._steps) < self._depth and self._launch():
                continue
            self._collect()

    def _launch(self) -> bool:
        """Start the next step, if there is anything to run."""
        started = time.monotonic()
        plan = self._scheduler.plan()
        self._seconds["planning"] += time.monotonic() - started
        if plan is None:
            return False
        logger.debug("%s", plan)
        launched_at = time.monotonic()
        step: PendingStep
        try:
            step = self._executor.launch(plan)
        except Exception as error:
            step = _FailedStep(error)
        self._steps.append((plan.step_id, step, launched_at))
        return True

    def _collect(self) -> None:
        """Wait for the oldest step, apply its result and tell the news. Returns early if another can be planned."""
        if not self._steps:
            return
        step_id, step, launched_at = self._steps[0]
        was_done = step.wait(0)
        while not step.wait(COMMAND_INTERVAL):
            now = time.monotonic()
            if now - max(launched_at, self._step_done) > self._options.watchdog_timeout:
                raise RuntimeError(
                    f"step {step_id} has not ended within {self._options.watchdog_timeout:g} s (--watchdog-timeout)"
                )
            self._publish()
            if self._obey(timeout=0) and len(self._steps) < self._depth:
                return
        self._steps.popleft()
        try:
            result = step.result()
            self._num_failures = 0
        except Exception as error:
            logger.exception("step %d failed", step_id)
            result = StepResult(step_id=step_id, token_ids=(), error=f"{type(error).__name__}: {error}")
            self._num_failures += 1
        # Steps run one after the other: this one began when it was launched, or when the one before it ended. If it
        # ended unseen, then while the next one was launched, which took the time: that is counted there.
        begun, now = max(launched_at, self._step_done), time.monotonic()
        self._step_done = max(begun, self._steps[0][2]) if was_done and self._steps else now
        self._seconds["steps"] += self._step_done - begun
        self._scheduler.apply(result, self._step_done - begun)
        self._publish()
        self._seconds["results"] += time.monotonic() - now
        if self._profiling.active:
            self._profiling.step_done()
        if self._num_failures == MAX_FAILURES:
            raise RuntimeError(
                f"{MAX_FAILURES} steps in a row failed, the last with {result.error}; restart the server"
            )

    def _obey(self, timeout: float | None) -> bool:
        """Execute the commands that have come. Whether any had."""
        commands = self._link.receive(timeout)
        for command in commands:
            self._execute(command)
        if commands:
            self._publish()
        return bool(commands)

    def _execute(self, command: Command) -> None:
        match command:
            case Submit():
                refused = [output for output in map(self._submit, command.requests) if output is not None]
                if refused:
                    self._send(StepOutputs(outputs=tuple(refused)))
            case Abort():
                self._scheduler.abort(command.rid, keep_tokens=command.keep_tokens)
            case AbortAll():
                self._scheduler.abort_all()
            case Flush():
                self._flushes.append(command.id)
                self._answer_flushes()
            case Pause():
                self._scheduler.pause(command.mode)
                self._send(Reply(id=command.id, ok=True))
            case Resume():
                self._scheduler.resume()
                self._send(Reply(id=command.id, ok=True))
            case StartProfile():
                self._profiling.start(command)
            case StopProfile():
                self._profiling.stop(command)
            case Info():
                self._send(Reply(id=command.id, ok=True, payload=self._numbers()))
            case Shutdown():
                self._open = False
                self._scheduler.resume()
                if not command.drain:
                    self._scheduler.abort_all()

    def _numbers(self) -> dict[str, Any]:
        """The scheduler's, and where the loop's time went since the start: planning, steps, results."""
        seconds = {f"total_seconds_{part}": seconds for part, seconds in self._seconds.items()}
        return {**dataclasses.asdict(self._scheduler.stats()), **seconds}

    def _submit(self, request: Request) -> RequestOutput | None:
        """Queue a request; the answer, if it is refused."""
        try:
            if not self._open:
                raise Overloaded("the server is shutting down")
            self._scheduler.submit(request)
        except (BadRequest, Overloaded) as error:
            return _refusal(request, error)
        return None

    def _publish(self) -> None:
        """Tell the news; if there has been none for a while, that the loop lives."""
        if outputs := self._scheduler.drain():
            self._send(StepOutputs(outputs=tuple(outputs)))
        elif time.monotonic() - self._last_sent > PULSE_INTERVAL:
            self._send(Pulse())
        if self._flushes:
            self._answer_flushes()

    def _answer_flushes(self) -> None:
        """Let results come in first that nobody waits for any more: a client may flush as soon as it is served."""
        scheduler = self._scheduler
        if scheduler.has_work and not (scheduler.num_running or scheduler.num_waiting):
            return
        flushed = scheduler.flush()
        for command_id in self._flushes:
            self._send(Reply(id=command_id, ok=flushed))
        self._flushes.clear()

    def _check(self) -> None:
        try:
            self._scheduler.check()
        except AssertionError:
            logger.exception("the accounting of the cache is broken; please report this")
            if self._options.strict_checks:
                raise

    def _send(self, event: Event) -> None:
        self._link.send(event)
        self._last_sent = time.monotonic()


@dataclass(frozen=True, slots=True)
class _FailedStep:
    """A step that could not even be launched. It takes its turn, as results are applied in order."""

    error: Exception

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def result(self) -> StepResult:
        raise self.error


def _refusal(request: Request, error: HornbeamError) -> RequestOutput:
    finish = Finish(type="abort", message=str(error), status=error.status)
    return RequestOutput(rid=request.rid, finish=finish, num_prompt=len(request.prompt_ids))
