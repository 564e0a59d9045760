"""Where an engine's time goes: device busy, the loop's CPU time by stage, bubbles. And traces of torch's profiler.

Works by wrapping scheduler and executor of an engine in this process, so it costs an engine that is not profiled
nothing. The device counts as busy with a step from its launch, or the end of the one before, until its end.
"""

import dataclasses
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from hornbeam import Engine
from hornbeam.config.flags import check_flags
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.engine.build import build_engine
from hornbeam.engine.parts import Built, Executor, PendingStep
from hornbeam.scheduler.scheduler import Scheduler

LARGE = 0.9  # of the most decode rows: steps from there on count as large ones
STAGES = ("plan", "launch", "wait", "apply", "drain")
_TIMED = {"plan", "apply", "drain"}  # calls of the scheduler


@dataclasses.dataclass(slots=True, kw_only=True)
class Split:
    """Seconds, of the loop's thread and of the device."""

    seconds: float = 0.0
    num_steps: int = 0
    device_busy: float = 0.0
    stages: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    decode_steps: list[tuple[int, float]] = dataclasses.field(default_factory=list)  # rows, seconds to plan and launch

    @property
    def rows(self) -> dict[str, float]:
        """Name -> seconds: the device's two, then the stages of the loop's thread, which add up to all."""
        rest = max(0.0, self.seconds - sum(self.stages.values()))
        return {
            "device busy": self.device_busy,
            "device idle (bubbles)": max(0.0, self.seconds - self.device_busy),
            "CPU: plan": self.stages["plan"],
            "CPU: launch": self.stages["launch"],
            "CPU: apply results": self.stages["apply"],
            "CPU: collect news": self.stages["drain"],
            "CPU: send, commands, else": rest,
            "waiting for the device": self.stages["wait"],
        }

    @property
    def large_decode_step(self) -> tuple[int, float]:
        """The most rows of a step without prompts, and the median of what steps with about as many cost the CPU."""
        most = max((rows for rows, _ in self.decode_steps), default=0)
        times = [seconds for rows, seconds in self.decode_steps if rows >= LARGE * most]
        return most, statistics.median(times) if times else 0.0

    def table(self) -> str:
        """For people."""
        rows, cpu_seconds = self.large_decode_step
        lines = [f"  {'':<26} {'seconds':>9} {'share':>7} {'ms/step':>9}"]
        for name, seconds in self.rows.items():
            share, per_step = seconds / self.seconds, seconds * 1000 / max(1, self.num_steps)
            lines.append(f"  {name:<26} {seconds:>9.3f} {share:>7.1%} {per_step:>9.3f}")
        lines.append(f"  {self.num_steps} steps in {self.seconds:.3f} s, all runs")
        lines.append(f"  to plan and launch a decode step of about {rows} rows: {cpu_seconds * 1000:.3f} ms, median")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        most_rows, cpu_seconds = self.large_decode_step
        numbers = {"num_steps": self.num_steps, "seconds": self.seconds, "most_decode_rows": most_rows}
        numbers["CPU: plan and launch of a large decode step"] = round(cpu_seconds, 6)
        return numbers | {name: round(value, 6) for name, value in self.rows.items()}


class ProfiledEngine(Engine):
    """A `hornbeam.Engine` with a watch on its loop."""

    def __init__(self, user: Mapping[str, Any]) -> None:
        self._probe = _Probe()
        self._open(lambda flags: self._probe.attach(build_engine(flags)), check_flags(user))

    @contextmanager
    def watched(self) -> Iterator[Split]:
        """The split of what runs inside; complete at the end."""
        self._probe.steps.join()  # what ran before does not count
        split = self._probe.split = Split()
        started = time.perf_counter()
        yield split
        self._probe.steps.join()
        split.seconds = time.perf_counter() - started


class _Probe:
    """Adds up, on the loop's thread; the device's time on a thread that waits for one step after the other."""

    def __init__(self) -> None:
        self.split = Split()
        self.last = dict.fromkeys(STAGES, 0.0)  # seconds of each stage's latest turn
        self.steps: queue.Queue[tuple[float, PendingStep]] = queue.Queue()
        threading.Thread(target=self._watch_device, name="hornbeam-probe", daemon=True).start()

    def attach(self, built: Built) -> Built:
        """The same engine, watched."""
        scheduler = cast(Scheduler, _TimedScheduler(built.scheduler, self))
        return dataclasses.replace(built, scheduler=scheduler, executor=_TimedExecutor(built.executor, self))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside belongs to it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.last[name] = time.perf_counter() - started
            self.split.stages[name] += self.last[name]

    def _watch_device(self) -> None:
        last_end = 0.0
        while True:
            started, step = self.steps.get()
            step.wait()
            end = time.perf_counter()
            self.split.device_busy += end - max(started, last_end)
            self.split.num_steps += 1
            last_end = end
            self.steps.task_done()


class _TimedScheduler:
    """Passes everything on; a few calls are timed."""

    def __init__(self, scheduler: Scheduler, probe: _Probe) -> None:
        self._scheduler, self._probe = scheduler, probe

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._scheduler, name)
        return self._timed(name, attribute) if name in _TIMED else attribute

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with self._probe.stage(name):
                return call(*arguments)

        return run


class _TimedExecutor:
    def __init__(self, executor: Executor, probe: _Probe) -> None:
        self._executor, self._probe = executor, probe

    def launch(self, plan: StepPlan) -> PendingStep:
        """See `Executor`."""
        started = time.perf_counter()
        with self._probe.stage("launch"):
            step = self._executor.launch(plan)
        if not plan.chunks:
            seconds = self._probe.last["plan"] + self._probe.last["launch"]
            self._probe.split.decode_steps.append((len(plan.decode), seconds))
        self._probe.steps.put((started, step))
        return _TimedStep(step, self._probe)


@dataclasses.dataclass(frozen=True, slots=True)
class _TimedStep:
    step: PendingStep
    probe: _Probe

    def wait(self, timeout: float | None = None) -> bool:
        with self.probe.stage("wait"):
            return self.step.wait(timeout)

    def result(self) -> StepResult:
        with self.probe.stage("wait"):
            return self.step.result()


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Write a trace of what runs inside, on all threads and devices; chrome://tracing and Perfetto show it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=everywhere) as profiler:
        yield
    profiler.export_chrome_trace(str(path))
