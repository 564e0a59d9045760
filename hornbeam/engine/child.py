"""The engine process as the server that starts it sees it: its start, its end, and what became of it.

The child gets its options on stdin, which stays open: at its end the child knows that the server is gone, and ends too.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from typing import Any

KILL_SECONDS = 5.0


async def start_child(options: Mapping[str, Any]) -> Process:
    """Start `hornbeam.engine.process`; `options` are JSON values."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hornbeam.engine.process"),
        stdin=PIPE,
        start_new_session=True,  # Ctrl-C reaches the server alone, which ends the engine in order
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(options).encode() + b"\n")
    return process


async def end_child(process: Process, timeout: float) -> None:
    """Wait until it has ended, having been told so; after `timeout` seconds it is made to, and killed in the end."""
    assert process.stdin is not None
    try:
        await asyncio.wait_for(process.wait(), timeout)
    except TimeoutError:
        process.stdin.close()  # as if the server were gone
    try:
        await asyncio.wait_for(process.wait(), KILL_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def fate_of(process: Process) -> str:
    """Wait until it has ended, and tell how, for people."""
    code = await process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the engine process {how}"
