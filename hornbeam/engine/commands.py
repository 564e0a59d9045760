"""What an operator asks of a running engine, and its replies: flush, pause, profiles, numbers.

Lives in the server's event loop, as the frontend does. Knows no requests.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, Literal

from hornbeam.core.errors import BadRequest
from hornbeam.core.profile import ProfileOptions
from hornbeam.engine.envelope import Command, Flush, Info, Pause, Reply, Resume, StartProfile, StopProfile

FLUSH_INTERVAL = 0.05  # seconds between two attempts


class Commands:
    """The commands that an engine replies to. Each raises what `check_open` does, also if the engine ends meanwhile.

    Args:
        send: hands a command to the engine.
        check_open: raises an error while the engine cannot be asked.
    """

    def __init__(self, send: Callable[[Command], None], check_open: Callable[[], None]) -> None:
        self._send = send
        self._check_open = check_open
        self._ids = itertools.count()
        self._replies: dict[int, asyncio.Future[Reply]] = {}

    async def flush(self, timeout: float = 0.0) -> bool:
        """Drop the prefix cache. False if requests still run or wait after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (await self._ask(Flush(next(self._ids)))).ok:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(FLUSH_INTERVAL)
        return True

    async def pause(self, mode: Literal["in_place", "retract", "abort"]) -> None:
        """Run nothing until `resume`; see `Scheduler.pause`. Requests are still taken, and wait."""
        await self._ask(Pause(next(self._ids), mode))

    async def resume(self) -> None:
        """Go on after `pause`; without one, nothing happens."""
        await self._ask(Resume(next(self._ids)))

    async def start_profile(self, options: ProfileOptions) -> dict[str, Any]:
        """Record steps with torch's profiler; with `num_steps` it returns when they are done.

        Returns:
            "file", where it has ended already.

        Raises:
            BadRequest: a profile is being recorded already, or cannot be.
        """
        return _payload(await self._ask(StartProfile(next(self._ids), options)))

    async def stop_profile(self) -> dict[str, Any]:
        """End the profile; "file" has it. Raises BadRequest if there is none, or it cannot be written."""
        return _payload(await self._ask(StopProfile(next(self._ids))))

    async def info(self) -> dict[str, Any]:
        """The scheduler's numbers; see `SchedulerStats`."""
        return (await self._ask(Info(next(self._ids)))).payload

    def answer(self, reply: Reply) -> None:
        """The engine's reply has come."""
        future = self._replies.pop(reply.id, None)
        if future is not None and not future.done():
            future.set_result(reply)

    def fail(self) -> None:
        """The engine has ended: no reply will come."""
        for future in self._replies.values():
            future.cancel()

    async def _ask(self, command: Flush | Info | Pause | Resume | StartProfile | StopProfile) -> Reply:
        self._check_open()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[command.id] = future
        self._send(command)
        await asyncio.wait((future,))
        if future.cancelled():
            self._check_open()
        return future.result()


def _payload(reply: Reply) -> dict[str, Any]:
    if not reply.ok:
        raise BadRequest(reply.payload["message"])
    return reply.payload
