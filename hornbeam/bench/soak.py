"""Thousands of short requests, some of which their clients leave: does memory stay flat, and is every slot freed?"""

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hornbeam.bench.live import LiveServer, live_server
from hornbeam.bench.report import show
from hornbeam.core.errors import HornbeamError

NUM_CLIENTS = 64
LEAVING = 0.3  # share of clients that go away before the answer is there
MAX_PATIENCE = 0.3  # seconds that such a client waits
FREE_SECONDS = 1.0  # for slots to be free after the last client has gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """Resident bytes at some points of the run: (requests so far, of the server, of the engine)."""

    num_requests: int
    num_left: int
    memory: tuple[tuple[int, int, int], ...]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.num_requests} requests, {self.num_left} left by their clients; every slot was freed"]
        lines += (
            f"after {num:6}: server {server / 2**20:7.1f} MiB, engine {engine / 2**20:7.1f} MiB"
            for num, server, engine in self.memory
        )
        return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench soak`."""
    parser = argparse.ArgumentParser(prog="hornbeam bench soak", description=__doc__)
    parser.add_argument("--model-path", help="Whose tokenizer is used. Default: the default model's.")
    parser.add_argument("--requests", type=int, default=20_000, help="Default: %(default)s.")
    values = parser.parse_args(argv)
    soak = run_soak({} if values.model_path is None else {"model_path": values.model_path}, values.requests)
    show(str(soak))
    show(json.dumps(soak.as_json()))
    return 0


def run_soak(user: dict[str, Any], num_requests: int) -> Soak:
    """Send `num_requests` in ten rounds.

    Raises:
        HornbeamError: the server did not start, an answer is wrong, or slots stay taken.
    """

    async def run() -> Soak:
        draw = random.Random(0)
        num_left, memory = 0, []
        async with live_server(user) as server:
            for part in range(1, 11):
                left = [draw.random() < LEAVING for _ in range(num_requests // 10)]
                await _round(server, [draw.uniform(0, MAX_PATIENCE) if leaves else None for leaves in left], draw)
                num_left += sum(left)
                await _check_free(server)
                memory.append((part * (num_requests // 10), *server.memory))
        return Soak(num_requests=num_requests // 10 * 10, num_left=num_left, memory=tuple(memory))

    return asyncio.run(run())


async def _round(server: LiveServer, patience: list[float | None], draw: random.Random) -> None:
    waiting = list(patience)

    async def client() -> None:
        while waiting:
            await _request(server, waiting.pop(), draw.random() < 0.5, f"Request {draw.randrange(10**9)} of many.")

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))


async def _request(server: LiveServer, patience: float | None, stream: bool, text: str) -> None:
    """`patience`: seconds after which the client leaves; None: it waits for the answer."""
    limit = 8 if patience is None else 500
    body = {"text": text, "stream": stream, "sampling_params": {"max_new_tokens": limit, "ignore_eos": True}}
    reader, writer = await server.open("POST", "/generate", body)
    try:
        if patience is not None:
            await asyncio.sleep(patience)
        elif b'"completion_tokens":8' not in await reader.read():
            raise HornbeamError("an answer is incomplete")
    finally:
        writer.close()


async def _check_free(server: LiveServer) -> None:
    await asyncio.sleep(FREE_SECONDS)
    response = await server.ask("GET", "/get_load")
    (load,) = json.loads(response[response.index(b"[") :])
    if load["num_reqs"]:
        raise HornbeamError(
            f"{load['num_reqs']} requests still hold slots {FREE_SECONDS:.0f} s after their clients left"
        )
