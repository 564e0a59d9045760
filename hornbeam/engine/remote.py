"""An engine in a process of its own: both ends of the unix sockets, in a private folder, that join it to the server.

Neither waits for an end that has gone: the server watches the child's exit, the child its stdin (`child.py`).
"""

import asyncio
import contextlib
import faulthandler
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import zmq

from hornbeam.engine.child import end_child, fate_of, start_child
from hornbeam.engine.envelope import Command, Event

logger = logging.getLogger(__name__)

COMMANDS, EVENTS = "commands", "events"  # the sockets' names


class ProcessEngine:
    """See `EngineHandle`.

    Args:
        build: "module:attribute" of the function that makes the engine of `user`, in the child.
        user: checked flags, as JSON values. Keys of the API have no business there.
        log_level: of the child.
    """

    def __init__(self, build: str, user: Mapping[str, Any], log_level: str = "info") -> None:
        self._options = {"build": build, "user": dict(user), "log_level": log_level}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], Event] = msgspec.msgpack.Decoder(Event).decode
        self._folder = ""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._commands: zmq.Socket[bytes] | None = None
        self._events_fd = -1
        self._outbox: list[msgspec.Raw] = []  # commands of this turn of the event loop
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self, on_event: Callable[[Event], None], on_end: Callable[[str], None]) -> None:
        """See `EngineHandle`."""
        self._folder = tempfile.mkdtemp(prefix="hornbeam-")  # mode 0700
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PUSH)
        events = self._context.socket(zmq.PULL)
        for name, socket in ((COMMANDS, self._commands), (EVENTS, events)):
            socket.set(zmq.LINGER, 0)
            socket.set_hwm(0)
            socket.bind(f"ipc://{self._folder}/{name}")
        self._process = await start_child({**self._options, "folder": self._folder})
        self._events_fd = events.fileno()
        asyncio.get_running_loop().add_reader(self._events_fd, self._read, events, on_event, on_end)
        self._watch = asyncio.create_task(_watch(self._process, on_end))

    def send(self, command: Command) -> None:
        """See `EngineHandle`. Those of one turn of the event loop are one message: each message wakes a thread."""
        self._outbox.append(msgspec.Raw(self._encode(command)))
        if len(self._outbox) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._commands is not None:
            with contextlib.suppress(zmq.Again):  # nobody at the other end: `on_end` tells what happened
                self._commands.send(self._encode(self._outbox), zmq.NOBLOCK)
        self._outbox.clear()

    async def close(self, timeout: float) -> None:
        """See `EngineHandle`. Kills what does not end."""
        if self._process is not None:
            await end_child(self._process, timeout)
            asyncio.get_running_loop().remove_reader(self._events_fd)
        if self._watch is not None:
            self._watch.cancel()
        if self._context is not None:
            self._commands = None
            self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, events: Any, on_event: Callable[[Event], None], on_end: Callable[[str], None]) -> None:
        """Take all that is there, since the file descriptor tells of it once; from a socket."""
        try:
            with contextlib.suppress(zmq.Again):
                while True:
                    on_event(self._decode(events.recv(zmq.NOBLOCK)))
        except Exception as error:
            logger.exception("the engine's events cannot be read")
            asyncio.get_running_loop().remove_reader(self._events_fd)
            on_end(f"the engine's events cannot be read: {error}")


async def _watch(process: asyncio.subprocess.Process, on_end: Callable[[str], None]) -> None:
    on_end(await fate_of(process))


class SocketLink:
    """The engine's end of the sockets in `folder`, in its process; see `Link`.

    If the loop does not come back to `receive` within about `watchdog_timeout` seconds, other than to wait there, the
    process ends, with the stacks of all threads on stderr.
    """

    def __init__(self, folder: str, watchdog_timeout: float) -> None:
        self._watchdog_timeout = watchdog_timeout
        self._watched_since = -math.inf
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], list[Command]] = msgspec.msgpack.Decoder(list[Command]).decode
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._events = self._context.socket(zmq.PUSH)
        for name, socket in ((COMMANDS, self._commands), (EVENTS, self._events)):
            socket.set_hwm(0)
            socket.connect(f"ipc://{folder}/{name}")

    def receive(self, timeout: float | None) -> Sequence[Command]:
        """See `Link`."""
        if timeout != 0:
            faulthandler.cancel_dump_traceback_later()
            self._watched_since = -math.inf
            self._commands.poll(None if timeout is None else int(timeout * 1000))
        if time.monotonic() - self._watched_since > self._watchdog_timeout / 10:
            faulthandler.dump_traceback_later(1.1 * self._watchdog_timeout, exit=True)
            self._watched_since = time.monotonic()
        received: list[Command] = []
        with contextlib.suppress(zmq.Again):
            while True:
                received += self._decode(self._commands.recv(zmq.NOBLOCK))
        return received

    def send(self, event: Event) -> None:
        """See `Link`."""
        self._events.send(self._encode(event))

    def close(self, timeout: float) -> None:
        """Wait until what was sent has left."""
        self._context.destroy(linger=int(timeout * 1000))
