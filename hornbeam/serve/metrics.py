"""What Prometheus collects at /metrics: requests and tokens as they pass, and the scheduler's numbers.

Names and labels are those that dashboards for SGLang know.
"""

import time
import weakref
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hornbeam.core.errors import HornbeamError
from hornbeam.core.request import RequestOutput
from hornbeam.engine.stream import InFlight
from hornbeam.serve.app import TEXT, Route
from hornbeam.serve.loads import PREFIX, core_numbers
from hornbeam.serve.serving import Serving

_FIRST_TOKEN_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 400)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
_REQUEST_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_TOKENS = (1, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_GAUGES = {
    "num_running_reqs": "Requests that run.",
    "num_waiting_reqs": "Requests that wait.",
    "num_used_tokens": "Tokens that running requests hold in the cache.",
    "token_usage": "Their share of the cache.",
    "gen_throughput": "Generated tokens per second.",
    "cache_hit_rate": "Share of prompt tokens that were found in the cache.",
    "max_total_num_tokens": "Tokens that the cache has room for.",
    "utilization": "Share of the requests that can run at once.",
}
_NAMES = {"num_waiting_reqs": "num_queue_reqs"}  # of those that are called otherwise here


class Metrics:
    """The numbers of one server; sees what its frontend hears (`engine.frontend.Observer`)."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._heard: weakref.WeakKeyDictionary[InFlight, float] = weakref.WeakKeyDictionary()
        self._prompt_tokens = self._counter("prompt_tokens_total", "Tokens of prompts.")
        self._cached_tokens = self._counter("cached_tokens_total", "Tokens of prompts that were found in the cache.")
        self._generated_tokens = self._counter("generation_tokens_total", "Generated tokens.")
        self._requests = self._counter("num_requests_total", "Requests that have ended.")
        self._aborted = self._counter("num_aborted_requests_total", "Requests that were aborted.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_SECONDS
        )
        self._next_token = self._histogram("inter_token_latency_seconds", "Between two tokens.", _TOKEN_SECONDS)
        self._request = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST_SECONDS
        )
        self._prompt_lens = self._histogram("prompt_tokens_histogram", "Tokens of a prompt.", _TOKENS)
        self._output_lens = self._histogram("generation_tokens_histogram", "Tokens that a request generated.", _TOKENS)
        self._retractions = self._gauge("num_retracted_requests_total", "Requests that had to give way.")
        self._gauges = {name: self._gauge(_NAMES.get(name, name), text) for name, text in _GAUGES.items()}
        names = ["endpoint", "method"]
        self.http_requests = Counter(f"{PREFIX}http_requests_total", "HTTP requests.", names, registry=self._registry)
        self.http_responses = Counter(
            f"{PREFIX}http_responses_total", "HTTP responses.", [*names, "status_code"], registry=self._registry
        )
        self.http_active = Gauge(
            f"{PREFIX}http_requests_active", "HTTP requests under way.", names, registry=self._registry
        )

    def heard(self, entry: InFlight, output: RequestOutput) -> None:
        """News of a request has come, and the request has taken it."""
        now = time.monotonic()
        before = self._heard.get(entry)
        num_new = len(output.token_ids)
        if num_new:
            self._generated_tokens.inc(num_new)
            if before is None:
                self._first_token.observe(now - entry.arrived)
            else:
                for _ in range(num_new):
                    self._next_token.observe((now - before) / num_new)
            self._heard[entry] = now
        if entry.done:
            self._requests.inc()
            self._request.observe(now - entry.arrived)
            self._prompt_tokens.inc(output.num_prompt)
            self._cached_tokens.inc(output.num_cached)
            self._prompt_lens.observe(output.num_prompt)
            self._output_lens.observe(output.num_generated)
            if output.finish is not None and output.finish.type == "abort":
                self._aborted.inc()

    def left(self, entries: Sequence[InFlight]) -> None:
        """The reader of these has gone before their ends."""
        self._requests.inc(len(entries))
        self._aborted.inc(len(entries))

    def text(self, state: dict[str, float] | None) -> bytes:
        """All numbers as Prometheus reads them. `state`: of `Serving.state`, if the engine can tell."""
        if state is not None:
            numbers = core_numbers(state)
            for name, gauge in self._gauges.items():
                gauge.set(numbers[name])
            self._retractions.set(state["total_retractions"])
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(PREFIX + name, text, ["model_name"], registry=self._registry)
        return counter.labels(self._model_name)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(PREFIX + name, text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name)


def metrics_routes(serving: Serving, metrics: Metrics) -> tuple[Route, ...]:
    """The table of paths."""

    async def read(request: Request) -> Response:
        """All metrics, in Prometheus's text format."""
        try:
            state = await serving.state()
        except HornbeamError:  # the engine starts, or has ended: what the server knows can be told all the same
            state = None
        return Response(metrics.text(state), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return (Route(path="/metrics", methods=("GET",), handler=read, media=(TEXT,)),)


class HttpMetrics:
    """ASGI middleware that counts requests and responses by route."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        labels = (scope["path"] if scope["path"] in self._paths else "other", scope["method"])

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.http_responses.labels(*labels, message["status"]).inc()
            await send(message)

        self._metrics.http_requests.labels(*labels).inc()
        active = self._metrics.http_active.labels(*labels)
        active.inc()
        try:
            await self._app(scope, receive, count)
        finally:
            active.dec()
