"""The server process: listens, starts the engine process, serves HTTP until a signal, and ends in order."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop

from hornbeam.config.components import ServeOptions
from hornbeam.config.resolve import resolve_serve
from hornbeam.core.errors import ConfigError
from hornbeam.engine.logs import set_up_logging
from hornbeam.engine.remote import ProcessEngine
from hornbeam.models.index import DEFAULT_MODEL_NAME
from hornbeam.serve.routes import create_metrics, create_server_app
from hornbeam.serve.serving import Serving, engine_flags, with_model

if TYPE_CHECKING:
    from hornbeam.serve.metrics import Metrics

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 30  # for running requests after the first signal
CLOSE_SECONDS = 5.0  # for an engine without requests to end
YOUNG_OBJECTS = 50_000  # between two looks for garbage: most of a request's objects are gone by then, unlike after 700
BACKLOG = 2048  # connections that wait to be accepted
ENGINE = "hornbeam.engine.build:build_engine"


def run_server(user: Mapping[str, Any], build: str = ENGINE) -> None:
    """Serve until SIGTERM or SIGINT; the first lets running requests finish, a second ends at once.

    Args:
        user: checked flags.
        build: "module:attribute" of the function that makes the engine in its process.

    Raises:
        ConfigError: a flag, the model or the machine cannot work, or the port is taken.
        EngineDead: the engine failed before it was ready.
    """
    options = resolve_serve(user, DEFAULT_MODEL_NAME)
    set_up_logging(options.log_level, "server")
    with _listen(options) as listener:
        user = with_model(user)
        engine = ProcessEngine(build, engine_flags(user), options.log_level)
        metrics = create_metrics(options)
        uvloop.run(_serve(Serving(engine, options, user, metrics), metrics, listener))


async def _serve(serving: Serving, metrics: "Metrics | None", listener: socket.socket) -> None:
    """HTTP answers at once, with 503 until the engine is ready."""
    options = serving.options
    debug = options.log_level == "debug"
    config = uvicorn.Config(
        create_server_app(serving, metrics),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="debug" if debug else "warning",
        access_log=debug,
        proxy_headers=False,  # nobody here asks who the client is
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = _HttpServer(config)
    starting = asyncio.create_task(_start(serving, listener))
    starting.add_done_callback(server.stop_if_failed)
    try:
        await server.serve(sockets=[listener])
        if starting.done():
            starting.result()
    finally:
        starting.cancel()
        await serving.frontend.close(drain=not server.force_exit, timeout=CLOSE_SECONDS)
        logger.info("the server has ended")


async def _start(serving: Serving, listener: socket.socket) -> None:
    await serving.start()
    gc.collect()
    gc.freeze()  # what the start has made stays: no request shall wait while it is searched for garbage
    gc.set_threshold(YOUNG_OBJECTS)
    host, port = listener.getsockname()[:2]
    logger.info("The server is ready at http://%s:%d", f"[{host}]" if ":" in host else host, port)


class _HttpServer(uvicorn.Server):
    """Ends with a return where uvicorn would end the process by the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def stop_if_failed(self, starting: asyncio.Task[None]) -> None:
        """A server without an engine has no use."""
        if starting.cancelled() or starting.exception() is not None:
            self.should_exit = True

    def _on_signal(self) -> None:
        logger.info("ending at once" if self.should_exit else "ending; running requests may finish")
        self.force_exit = self.should_exit
        self.should_exit = True


def _listen(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot listen on {options.host}:{options.port}: {reason}; choose another --port") from error
