"""A run of the scheduler as JSON lines, and its replay without a model.

The first line says how the scheduler was made; then comes one line per call that can change what it plans, in order.
A change of the scheduler that is meant to change no decision must replay every record to the same plans.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import msgspec

from hornbeam.config.components import CacheOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import BadRequest, Overloaded
from hornbeam.core.plan import StepPlan, StepResult
from hornbeam.core.request import Request, RequestOutput
from hornbeam.scheduler.scheduler import PauseMode, Scheduler


class Made(msgspec.Struct, frozen=True, tag=True):
    """The scheduler's arguments."""

    options: SchedulerOptions
    cache: CacheOptions
    specs: tuple[CacheSpec, ...]
    num_pages: tuple[int, ...]
    context_len: int
    eos_ids: frozenset[int]


class Submitted(msgspec.Struct, frozen=True, tag=True):
    """`submit`, also of a request that was refused; `at`: when, in seconds of some clock. Replays do not ask."""

    request: Request
    at: float


class Aborted(msgspec.Struct, frozen=True, tag=True):
    """`abort`."""

    rid: str
    keep_tokens: int | None
    message: str


class AbortedAll(msgspec.Struct, frozen=True, tag=True):
    """`abort_all`."""


class Paused(msgspec.Struct, frozen=True, tag=True):
    """`pause`."""

    mode: PauseMode


class Resumed(msgspec.Struct, frozen=True, tag=True):
    """`resume`."""


class Expired(msgspec.Struct, frozen=True, tag=True):
    """`expire`."""

    now: float


class Flushed(msgspec.Struct, frozen=True, tag=True):
    """`flush`."""


class Planned(msgspec.Struct, frozen=True, tag=True):
    """`plan`, and what it returned: a call that finds nothing to run may retract a request."""

    plan: StepPlan | None


class Applied(msgspec.Struct, frozen=True, tag=True):
    """`apply`."""

    result: StepResult
    seconds: float | None = None


Entry = Made | Submitted | Aborted | AbortedAll | Paused | Resumed | Expired | Flushed | Planned | Applied


class RecordingScheduler(Scheduler):
    """A scheduler that writes what happens to it to `file`, which stays open as long as it lives.

    Takes the arguments of `Scheduler`, all by name.
    """

    def __init__(self, file: IO[bytes], **arguments: Any) -> None:
        made = Made(**arguments)
        super().__init__(**arguments)
        self._file = file
        self._write(made)

    def _write(self, entry: Entry) -> None:
        self._file.write(msgspec.json.encode(entry) + b"\n")

    def submit(self, request: Request) -> None:
        """See `Scheduler`."""
        self._write(Submitted(request, time.monotonic()))
        super().submit(request)

    def abort(self, rid: str, *, keep_tokens: int | None = None, message: str = "Aborted") -> None:
        """See `Scheduler`."""
        self._write(Aborted(rid, keep_tokens, message))
        super().abort(rid, keep_tokens=keep_tokens, message=message)

    def abort_all(self) -> None:
        """See `Scheduler`."""
        self._write(AbortedAll())
        super().abort_all()

    def pause(self, mode: PauseMode) -> None:
        """See `Scheduler`."""
        self._write(Paused(mode))
        super().pause(mode)

    def resume(self) -> None:
        """See `Scheduler`."""
        self._write(Resumed())
        super().resume()

    def expire(self, now: float) -> None:
        """See `Scheduler`."""
        self._write(Expired(now))
        super().expire(now)

    def flush(self) -> bool:
        """See `Scheduler`."""
        self._write(Flushed())
        return super().flush()

    def plan(self) -> StepPlan | None:
        """See `Scheduler`."""
        plan = super().plan()
        self._write(Planned(plan))
        return plan

    def apply(self, result: StepResult, seconds: float | None = None) -> None:
        """See `Scheduler`."""
        self._write(Applied(result, seconds))
        super().apply(result, seconds)


def read_record(lines: Iterable[bytes]) -> Iterator[Entry]:
    """The entries of a record. Raises msgspec.ValidationError for a line that is none."""
    decoder: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)
    return (decoder.decode(line) for line in lines)


def replay(entries: Iterable[Entry], on_output: Callable[[RequestOutput], None] | None = None) -> Scheduler:
    """Do again what a record says, with a scheduler of today, and return it. `on_output` gets what it tells.

    Raises:
        AssertionError: it plans something else; both plans are told.
    """
    rest = iter(entries)
    made = next(rest)
    assert isinstance(made, Made), "a record begins with how the scheduler was made"
    scheduler = Scheduler(**{name: getattr(made, name) for name in made.__struct_fields__})
    for number, entry in enumerate(rest, start=2):
        if isinstance(entry, Planned):
            plan = scheduler.plan()
            assert plan == entry.plan, f"line {number}: planned {plan}, recorded is {entry.plan}"
        else:
            _repeat(scheduler, entry)
        for output in scheduler.drain():
            if on_output is not None:
                on_output(output)
    return scheduler


def _repeat(scheduler: Scheduler, entry: Entry) -> None:
    match entry:
        case Submitted():
            with contextlib.suppress(BadRequest, Overloaded):  # what only one of the two refuses shows in the plans
                scheduler.submit(entry.request)
        case Aborted():
            scheduler.abort(entry.rid, keep_tokens=entry.keep_tokens, message=entry.message)
        case AbortedAll():
            scheduler.abort_all()
        case Paused():
            scheduler.pause(entry.mode)
        case Resumed():
            scheduler.resume()
        case Expired():
            scheduler.expire(entry.now)
        case Flushed():
            scheduler.flush()
        case Applied():
            scheduler.apply(entry.result, entry.seconds)
