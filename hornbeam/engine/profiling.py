"""Profiles of a running engine: which steps are recorded, and whom to tell when it is over. Knows no torch."""

from collections.abc import Callable
from typing import Protocol

from hornbeam.core.errors import HornbeamError
from hornbeam.core.profile import ProfileOptions
from hornbeam.engine.envelope import Reply, StartProfile, StopProfile


class Profiler(Protocol):
    """Records what the device and its thread do."""

    def start(self, options: ProfileOptions) -> None:
        """Record from now on. Raises OSError if there can be no file."""

    def stop(self) -> str:
        """End the recording; the file that it was written to."""


class Profiling:
    """At most one profile at a time.

    Args:
        profiler: None for an engine that cannot be profiled.
        reply: answers a command.
    """

    def __init__(self, profiler: Profiler | None, reply: Callable[[Reply], None]) -> None:
        self._profiler = profiler
        self._reply = reply
        self._waiting: StartProfile | None = None  # is answered when its steps are done
        self.active = False  # something is recorded
        self._num_left = 0  # steps until then

    def start(self, command: StartProfile) -> None:
        """Begin; answered at once, or after `num_steps`."""
        try:
            if self._profiler is None or self.active:
                raise HornbeamError("a profile is being recorded" if self.active else "this engine has no profiler")
            self._profiler.start(command.options)
        except (HornbeamError, OSError) as error:
            self._reply(Reply(id=command.id, ok=False, payload={"message": str(error)}))
            return
        self.active = True
        if command.options.num_steps is None:
            self._reply(Reply(id=command.id, ok=True))
        else:
            self._waiting, self._num_left = command, command.options.num_steps

    def stop(self, command: StopProfile) -> None:
        """End the profile; the answer has the name of the file."""
        if not self.active:
            self._reply(Reply(id=command.id, ok=False, payload={"message": "no profile is being recorded"}))
            return
        self._reply(self._finish(command.id))

    def step_done(self) -> None:
        """A step has ended."""
        if self._waiting is not None:
            self._num_left -= 1
            if self._num_left == 0:
                self._finish(self._waiting.id)

    def _finish(self, command_id: int) -> Reply:
        assert self._profiler is not None, "something was recorded"
        self.active = False
        waiting, self._waiting = self._waiting, None
        try:
            reply = Reply(id=command_id, ok=True, payload={"file": self._profiler.stop()})
        except OSError as error:
            reply = Reply(id=command_id, ok=False, payload={"message": f"the profile cannot be written: {error}"})
        if waiting is not None:
            self._reply(Reply(id=waiting.id, ok=reply.ok, payload=reply.payload))
        return reply
