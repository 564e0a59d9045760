"""Helpers of tests that watch a server."""

import sys
import time
from collections.abc import Callable

import pytest

from hornbeam.serve import cli, server
from hornbeam.serve.server import run_server


def eventually(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def exit_like_cli(user: dict, build: str) -> None:
    """Run a server with another engine, as the command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "run_server", lambda flags: run_server(user, build))
        sys.exit(cli.main(["serve"]))
