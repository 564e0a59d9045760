"""What the server itself costs per generated token: many streams from an engine that only counts, a step each 40 ms."""

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hornbeam.bench.live import HOST, LiveServer, live_server
from hornbeam.bench.report import show
from hornbeam.core.errors import HornbeamError

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Count."}]},
    "/v1/completions": {"prompt": "one two"},
    "/generate": {"text": "one two"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCost:
    """One measurement."""

    path: str
    num_streams: int
    num_tokens: int
    seconds: float
    own_us: float  # CPU time of the server process per token, in microseconds
    kernel_us: float  # likewise, in the kernel: sockets
    health_p50_ms: float
    health_p99_ms: float

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.num_streams} streams, {self.num_tokens} tokens in {self.seconds:.1f} s, "
            f"{self.own_us:.1f} us of the server's CPU time per token, and {self.kernel_us:.1f} us in the kernel; "
            f"/health p50 {self.health_p50_ms:.1f} ms, p99 {self.health_p99_ms:.1f} ms"
        )


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench server`."""
    parser = argparse.ArgumentParser(prog="hornbeam bench server", description=__doc__)
    parser.add_argument("--model-path", help="Whose tokenizer is used. Default: the default model's.")
    parser.add_argument("--path", nargs="+", choices=BODIES, default=[*BODIES], help="Default: all.")
    parser.add_argument("--streams", type=int, default=256, help="At once. Default: %(default)s.")
    parser.add_argument("--tokens", type=int, default=200, help="Of each stream. Default: %(default)s.")
    values = parser.parse_args(argv)
    user = {} if values.model_path is None else {"model_path": values.model_path}
    costs = [measure_server(user, path, values.streams, values.tokens) for path in values.path]
    for cost in costs:
        show(str(cost))
    for cost in costs:
        show(json.dumps(cost.as_json()))
    return 0


def measure_server(user: dict[str, Any], path: str, num_streams: int, num_tokens: int) -> ServerCost:
    """Hold `num_streams` streams of `num_tokens` tokens each open at `path`, and ask for /health meanwhile.

    Raises:
        HornbeamError: the server did not start, or a stream is incomplete.
    """

    async def run() -> ServerCost:
        async with live_server(user) as server:
            await asyncio.gather(*(_stream(server, path, 8) for _ in range(16)))  # imports, caches
            return await _measure(server, path, num_streams, num_tokens)

    return asyncio.run(run())


async def _measure(server: LiveServer, path: str, num_streams: int, num_tokens: int) -> ServerCost:
    latencies: list[float] = []
    async with _health_probe(server, latencies):
        before, started = server.cpu_seconds, time.perf_counter()
        await asyncio.gather(*(_stream(server, path, num_tokens) for _ in range(num_streams)))
        after, seconds = server.cpu_seconds, time.perf_counter() - started
    own_us, kernel_us = (
        (end - start) / (num_streams * num_tokens) * 1e6 for start, end in zip(before, after, strict=True)
    )
    latencies.sort()
    return ServerCost(
        path=path,
        num_streams=num_streams,
        num_tokens=num_streams * num_tokens,
        seconds=seconds,
        own_us=own_us,
        kernel_us=kernel_us,
        health_p50_ms=latencies[len(latencies) // 2] * 1e3,
        health_p99_ms=latencies[len(latencies) * 99 // 100] * 1e3,
    )


@contextlib.asynccontextmanager
async def _health_probe(server: LiveServer, latencies: list[float]) -> AsyncIterator[None]:
    """Collects, at the end, how long /health took meanwhile."""
    command = [sys.executable, "-m", "hornbeam.bench.health_probe", HOST, str(server.port)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None, "asked for"
    first = await process.stdout.readline()
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        rest = await process.stdout.read()
        await process.wait()
    latencies += map(float, [first, *rest.splitlines()[:-1]])  # the last line may be cut


async def _stream(server: LiveServer, path: str, num_tokens: int) -> None:
    limit: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True}
    if path == "/generate":
        limit = {"sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True}}
    reader, writer = await server.open("POST", path, {**BODIES[path], **limit, "stream": True})
    num_events, tail = 0, b""
    try:
        while part := await reader.read(2**16):
            num_events += part.count(b"data: ")
            tail = (tail + part)[-200:]
    finally:
        writer.close()
    if b"[DONE]" not in tail or num_events < num_tokens // 2:
        raise HornbeamError(f"a stream of {path} is incomplete: {num_events} events, then {tail!r}")
