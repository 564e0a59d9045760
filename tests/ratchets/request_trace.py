"""Runs `hornbeam serve` with both processes telling which of its own files run code, while a flag file exists.

    python request_trace.py FLAG PORT CHECKPOINT

Each call of one of Hornbeam's functions while FLAG exists adds a line "path function" to FLAG.<process id>. A coroutine
that goes on after waiting is no call: the server's main one has waited since the start.
"""

import inspect
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import hornbeam

PACKAGE = f"{Path(hornbeam.__file__).parent}{os.sep}"


def trace(flag: str) -> None:
    """Begin, in this thread and those that it will start."""
    out = open(f"{flag}.{os.getpid()}", "a", buffering=1)  # noqa: SIM115  (open as long as the process lives)

    def on_event(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or not os.path.exists(flag):
            return
        if code.co_flags & inspect.CO_COROUTINE and frame.f_lineno != code.co_firstlineno:
            return
        out.write(f"{code.co_filename.removeprefix(PACKAGE)} {code.co_qualname}\n")

    threading.setprofile(on_event)
    sys.setprofile(on_event)


def build_engine(user: Mapping[str, Any]) -> Any:
    """`hornbeam.engine.build.build_engine`, traced; runs in the engine process."""
    trace(os.environ["REQUEST_TRACE_FLAG"])
    from hornbeam.engine import build

    return build.build_engine(user)


if __name__ == "__main__":
    from hornbeam.serve.server import run_server

    flag, port, checkpoint = sys.argv[1:]
    os.environ["REQUEST_TRACE_FLAG"] = flag
    trace(flag)
    run_server(
        {"model_path": checkpoint, "port": int(port), "max_total_tokens": 1024}, build="request_trace:build_engine"
    )
