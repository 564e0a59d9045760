"""Servers over the fake engine, on loopback ports."""

import asyncio
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fake_engine
import httpx
import openai
import pytest
import uvicorn

from hornbeam.config.flags import check_flags
from hornbeam.config.resolve import resolve_serve
from hornbeam.engine.transport import ThreadEngine
from hornbeam.serve import serving
from hornbeam.serve.routes import create_metrics, create_server_app, server_routes
from hornbeam.serve.serving import Serving, engine_flags


class Server:
    """A real HTTP server on a thread; the engine runs on another thread of this process."""

    def __init__(self, profiler: Any = None, **flags: Any) -> None:
        self._profiler = profiler
        user = check_flags({"model_path": "fake", **flags})
        options = resolve_serve(user, "x")
        self._metrics = create_metrics(options)
        engine = ThreadEngine(lambda: self._build(engine_flags(user)))
        self.serving = Serving(engine, options, user, self._metrics)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._ready = threading.Event()
        self._thread.start()
        assert self._ready.wait(10)
        self.http = httpx.Client(base_url=self.url, timeout=10)

    def _build(self, flags: dict[str, Any]) -> Any:
        self.built = dataclasses.replace(fake_engine.build(flags), profiler=self._profiler)
        return self.built

    async def _run(self) -> None:
        app = create_server_app(self.serving, self._metrics)
        self.paths = {route.path for route in server_routes(self.serving, self._metrics)}
        self._server = uvicorn.Server(
            uvicorn.Config(app, lifespan="off", log_config=None, http="httptools", timeout_graceful_shutdown=1)
        )
        starting = asyncio.create_task(self.serving.start())
        starting.add_done_callback(lambda task: self._ready.set())
        await self._server.serve(sockets=[self._socket])
        await starting
        await self.serving.frontend.close(drain=False, timeout=5)

    def state(self) -> dict[str, int]:
        return self.http.get("/server_info").json()["internal_states"][0]

    def num_running(self) -> int:
        state = self.state()
        return state["num_running"] + state["num_waiting"]

    def stop(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._socket.close()


@pytest.fixture(scope="session", autouse=True)
def _fake_tokenizer() -> Iterator[None]:
    """The fake model's folder does not exist; its tokenizer is made, not read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.Serving, "_read_checkpoint", _make_tokenizer)
        yield


def _make_tokenizer(serving: Serving) -> Any:
    return None if serving.options.skip_tokenizer else fake_engine.make_tokenizer()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Start servers that end with the test."""
    servers = []

    def start_one(**flags: Any) -> Server:
        servers.append(Server(**flags))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server_with_steps() -> Iterator[Server]:
    """One whose steps take 50 ms, so that each token is a chunk of its own, whatever else the machine does."""
    server = Server(random_seed=50)
    yield server
    server.stop()


@pytest.fixture
def client_of_steps(server_with_steps: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_with_steps.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A fast server that a module's tests share."""
    server = Server()
    yield server
    server.stop()
