"""How the server reaches its engine: the handle that every transport offers, and the one without a second process."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from hornbeam.engine.envelope import Command, Event
from hornbeam.engine.loop import run_engine
from hornbeam.engine.parts import Built


class EngineHandle(Protocol):
    """An engine, seen from the server's event loop. Callbacks run in that loop."""

    async def start(self, on_event: Callable[[Event], None], on_end: Callable[[str], None]) -> None:
        """Start the engine. `on_event` gets what it tells, in order; `on_end` is called once, with the reason."""

    def send(self, command: Command) -> None:
        """Hand over a command, in order, without waiting. An engine that has ended ignores it."""

    async def close(self, timeout: float) -> None:
        """Wait until the engine has ended, having been told so; after `timeout` seconds do not wait any longer."""


class ThreadEngine:
    """An engine on a thread of this process."""

    def __init__(self, build: Callable[[], Built]) -> None:
        self._build = build
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._ended = asyncio.Event()

    async def start(self, on_event: Callable[[Event], None], on_end: Callable[[str], None]) -> None:
        """See `EngineHandle`."""
        loop = asyncio.get_running_loop()

        def post(callback: Callable[[], None]) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
                loop.call_soon_threadsafe(callback)

        def run() -> None:
            run_engine(self._build, _QueueLink(self._commands, lambda event: post(lambda: on_event(event))))
            post(end)

        def end() -> None:
            self._ended.set()
            on_end("the engine has ended")

        threading.Thread(target=run, name="hornbeam-engine", daemon=True).start()

    def send(self, command: Command) -> None:
        """See `EngineHandle`."""
        self._commands.put(command)

    async def close(self, timeout: float) -> None:
        """See `EngineHandle`. A thread cannot be killed; a stuck one ends with the process."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout)


class _QueueLink:
    """The engine's end."""

    def __init__(self, commands: "queue.SimpleQueue[Command]", send: Callable[[Event], None]) -> None:
        self._commands = commands
        self._send = send

    def receive(self, timeout: float | None) -> Sequence[Command]:
        """See `Link`."""
        received = []
        with contextlib.suppress(queue.Empty):
            received.append(self._commands.get(timeout != 0, timeout))
            while True:
                received.append(self._commands.get_nowait())
        return received

    def send(self, event: Event) -> None:
        """See `Link`."""
        self._send(event)
