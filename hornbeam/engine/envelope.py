"""What crosses the border between server and engine, as msgpack where they are two processes.

Commands go to the engine, events come back. The in-process transport hands over the same objects. Never pickle.
"""

from typing import Any, Literal

import msgspec

from hornbeam.core.profile import ProfileOptions
from hornbeam.core.request import Request, RequestOutput


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue these requests, in order. A refused one is answered by an output that aborts it with a status."""

    requests: tuple[Request, ...]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request; unknown ids are ignored. `keep_tokens`: a stop string ended it after so many generated tokens."""

    rid: str
    keep_tokens: int | None = None


class AbortAll(msgspec.Struct, frozen=True, tag=True):
    """End every request."""


class Flush(msgspec.Struct, frozen=True, tag=True):
    """Drop the prefix cache. The `Reply` is not ok if requests run or wait."""

    id: int


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Run nothing until `Resume`; `mode` says what becomes of the running requests, see `Scheduler.pause`."""

    id: int
    mode: Literal["in_place", "retract", "abort"]


class Resume(msgspec.Struct, frozen=True, tag=True):
    """Go on after `Pause`."""

    id: int


class StartProfile(msgspec.Struct, frozen=True, tag=True):
    """Record steps. The `Reply` comes at once, or when `options.num_steps` are done; the payload may hold a message."""

    id: int
    options: ProfileOptions


class StopProfile(msgspec.Struct, frozen=True, tag=True):
    """End the profile. The `Reply`'s payload has the name of the file, or a message."""

    id: int


class Info(msgspec.Struct, frozen=True, tag=True):
    """Ask for the scheduler's numbers; they are the `Reply`'s payload."""

    id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Refuse new requests, finish (`drain`) or abort those that are there, then end."""

    drain: bool


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first event of an engine that works. `facts` describe model and options, for people and /server_info."""

    context_len: int
    vocab_size: int
    max_total_tokens: int
    max_running_requests: int
    facts: dict[str, Any]


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """The news of all requests after one step."""

    outputs: tuple[RequestOutput, ...]


class Reply(msgspec.Struct, frozen=True, tag=True):
    """The answer to the command with this id."""

    id: int
    ok: bool
    payload: dict[str, Any] = {}


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """The loop lives, though it has had nothing else to tell for a while."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine has ended, or never began. `is_config`: the operator can mend it; the message says how."""

    message: str
    is_config: bool = False


Command = Submit | Abort | AbortAll | Flush | Pause | Resume | StartProfile | StopProfile | Info | Shutdown
Event = Ready | StepOutputs | Reply | Pulse | Failed
