"""A server to measure from outside: two real processes, of which the engine only counts (`bench/counting.py`)."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hornbeam.core.errors import HornbeamError

HOST = "127.0.0.1"
START_SECONDS = 60.0
_RUN = (
    "import json, sys; from hornbeam.serve.server import run_server; "
    "run_server(json.loads(sys.argv[1]), 'hornbeam.bench.counting:build_engine')"
)


class LiveServer:
    """A running server and its process."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid

    @property
    def cpu_seconds(self) -> tuple[float, float]:
        """Of the server process so far, itself and in the kernel, in hundredths; the engine is another process."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        own, kernel = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:13])
        return own, kernel

    @property
    def memory(self) -> tuple[int, int]:
        """Resident bytes of the server and of the engine process."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return resident_bytes(self.pid), sum(resident_bytes(int(child)) for child in children)

    async def open(self, method: str, path: str, body: Any = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request on a connection of its own, which the server closes when it has answered."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return reader, writer

    async def ask(self, method: str, path: str, body: Any = None) -> bytes:
        """The whole response. Raises HornbeamError if its status is not 200."""
        reader, writer = await self.open(method, path, body)
        try:
            response = await reader.read()
        finally:
            writer.close()
        if not response.startswith(b"HTTP/1.1 200"):
            raise HornbeamError(f"{method} {path} failed: {response[:500].decode(errors='replace')}")
        return response


@contextlib.asynccontextmanager
async def live_server(user: dict[str, Any]) -> AsyncIterator[LiveServer]:
    """Run a server with the checked flags `user`, from ready on.

    Raises:
        HornbeamError: it did not get ready.
    """
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    flags = {"log_level": "warning", **user, "host": HOST, "port": port}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _RUN, json.dumps(flags))
    server = LiveServer(port, process.pid)
    try:
        await _wait_until_ready(server, process)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def _wait_until_ready(server: LiveServer, process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.returncode is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, HornbeamError):
            await server.ask("GET", "/health_generate")
            return
        await asyncio.sleep(0.1)
    raise HornbeamError("the server did not get ready; its log says why")


def resident_bytes(pid: int | str = "self") -> int:
    """Of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
