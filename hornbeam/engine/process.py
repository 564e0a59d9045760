"""The engine process: `python -m hornbeam.engine.process`, started by `ProcessEngine` with its options on stdin."""

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from hornbeam.engine.logs import set_up_logging
from hornbeam.engine.loop import run_engine
from hornbeam.engine.parts import Built
from hornbeam.engine.remote import SocketLink

WATCHDOG_SECONDS = 300.0  # unless --watchdog-timeout says otherwise
FAREWELL_SECONDS = 5.0  # for the server to read why the engine failed


def main() -> None:
    """Run an engine until it is told to end, it fails, or the server is gone."""
    options: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    set_up_logging(options["log_level"], "engine")
    gone = threading.Event()
    threading.Thread(target=_watch_server, args=(gone,), name="hornbeam-watch", daemon=True).start()
    link = SocketLink(options["folder"], options["user"].get("watchdog_timeout", WATCHDOG_SECONDS))
    succeeded = run_engine(lambda: _load(options["build"])(options["user"]), link)
    if not succeeded:
        gone.wait(FAREWELL_SECONDS)
    link.close(timeout=1.0)
    sys.stderr.flush()
    os._exit(
        0 if succeeded else 1
    )  # nothing is left to be done; worker threads and device contexts take seconds to end


def _watch_server(gone: threading.Event) -> None:
    """End at once when the server closes its end of stdin, or dies: no orphan keeps a device."""
    sys.stdin.buffer.read()
    gone.set()
    os._exit(1)


def _load(path: str) -> Callable[[Mapping[str, Any]], Built]:
    module, _, attribute = path.partition(":")
    function: Callable[[Mapping[str, Any]], Built] = getattr(importlib.import_module(module), attribute)
    return function


if __name__ == "__main__":
    main()
