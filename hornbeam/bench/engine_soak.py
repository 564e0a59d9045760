"""`hornbeam bench engine-soak`: thousands of short requests through an engine in this process, many of them cancelled.

After each tenth of them: is every page free, is memory flat, did tokens come without a stall?
"""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hornbeam import Engine
from hornbeam.bench.live import resident_bytes
from hornbeam.bench.report import append_json, show
from hornbeam.core.errors import HornbeamError
from hornbeam.engine.logs import set_up_logging
from hornbeam.serve.cli import FlagParser, checked

NUM_CLIENTS = 256
CANCELLED = 0.3  # share of requests
MAX_PATIENCE = 0.2  # seconds until such a request is cancelled
NUM_ROUNDS = 10
IDLE_SECONDS = 5.0  # for the engine to let go of everything
MAX_PROMPT, MAX_NEW = 200, 16
LONG_PROMPTS = 1 / 30  # share of requests
LONG = 400  # tokens asked for by those who will cancel
_ROW = "{:>9} {:>10} {:>12} {:>14} {:>15}"
_TITLES = ("requests", "cancelled", "host (MiB)", "device (MiB)", "longest gap (s)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """So far: requests and those cancelled. Now: resident bytes, and what torch holds of the device."""

    num_requests: int
    num_cancelled: int
    host_bytes: int
    device_bytes: int
    longest_gap: float  # seconds of this round in which no request ended


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench engine-soak`. Raises HornbeamError if an answer is wrong or pages stay taken."""
    parser = FlagParser("hornbeam bench engine-soak", __doc__ or "")
    parser.add_argument("--requests", type=int, default=20_000, help="Default: %(default)s.")
    parser.add_argument(
        "--longest-prompt", type=int, default=MAX_PROMPT, metavar="N", help="One prompt in 30 has up to N tokens."
    )
    parser.add_argument("--json", "--result-filename", type=Path, metavar="FILE", help="Append JSON lines to it.")
    parser.add_flags()
    values = parser.parse_flags(argv)
    num_requests, longest, json_path = (values.pop(name) for name in ("requests", "longest_prompt", "json"))
    user = {**checked(values), "skip_tokenizer_init": True}
    set_up_logging(user.get("log_level", "warning"), "bench")
    with Engine(**user) as engine:
        show(_ROW.format(*_TITLES))
        rounds = [asdict(round) for round in asyncio.run(_run(engine, num_requests // NUM_ROUNDS, longest))]
    show("\n".join(map(json.dumps, rounds)))
    append_json(json_path, rounds)
    return 0


async def _run(engine: Engine, size: int, longest_prompt: int) -> list[Round]:
    draw, rounds, num_cancelled = random.Random(0), [], 0
    for number in range(1, NUM_ROUNDS + 1):
        patience = [draw.uniform(0, MAX_PATIENCE) if draw.random() < CANCELLED else None for _ in range(size)]
        num_cancelled += sum(limit is not None for limit in patience)
        longest_gap = await _round(engine, patience, longest_prompt, draw)
        await _check_free(engine)
        memory = resident_bytes(), _device_bytes()
        rounds.append(
            Round(
                num_requests=number * size,
                num_cancelled=num_cancelled,
                host_bytes=memory[0],
                device_bytes=memory[1],
                longest_gap=longest_gap,
            )
        )
        sizes = (f"{num_bytes / 2**20:.1f}" for num_bytes in memory)
        show(_ROW.format(number * size, num_cancelled, *sizes, f"{longest_gap:.3f}"))
    return rounds


async def _round(engine: Engine, patience: list[float | None], longest_prompt: int, draw: random.Random) -> float:
    """Seconds of the longest time without an answer."""
    vocab_size = engine.get_server_info()["vocab_size"]
    waiting, last, longest = list(patience), time.monotonic(), 0.0

    async def client() -> None:
        nonlocal last, longest
        while waiting:
            most = longest_prompt if draw.random() < LONG_PROMPTS else min(MAX_PROMPT, longest_prompt)
            ids = draw.choices(range(vocab_size), k=draw.randint(1, most))
            await _request(engine, ids, waiting.pop(), draw.randint(1, MAX_NEW))
            now = time.monotonic()
            last, longest = now, max(longest, now - last)

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return longest


async def _request(engine: Engine, ids: list[int], patience: float | None, num_new: int) -> None:
    """`patience`: seconds after which the request is cancelled; None: it runs to its end."""
    params = {"max_new_tokens": num_new if patience is None else LONG, "ignore_eos": True}
    answer = engine.async_generate(input_ids=ids, sampling_params=params)
    if patience is not None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(answer, patience)
    elif len((await answer)["output_ids"]) != num_new:
        raise HornbeamError("an answer is incomplete")


async def _check_free(engine: Engine) -> None:
    deadline = time.monotonic() + IDLE_SECONDS
    while not engine.flush_cache():
        if time.monotonic() > deadline:
            raise HornbeamError(f"requests still run {IDLE_SECONDS:.0f} s after the last client has gone")
        await asyncio.sleep(0.01)
    info: dict[str, Any] = engine.get_server_info()["internal_states"][0]
    if used := info["num_used_tokens"] or info["num_cached_tokens"]:
        raise HornbeamError(f"pages of {used} tokens are neither free nor in use")


def _device_bytes() -> int:
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
