"""What every HTTP API here shares: JSON bodies in, JSON or server-sent events out; errors in one shape, which carries
both forms that clients look for: flat fields and a nested `error`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hornbeam.core.errors import BadRequest, HornbeamError

T = TypeVar("T")

_ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}
MAX_BODY_BYTES = 64 * 2**20
_DIRECT_SEND = "hornbeam.send"  # of a scope: the server's own `send`


class ClientGone(Exception):
    """The client has closed its connection."""


class BodyTooLarge(HornbeamError):
    """A body of more than MAX_BODY_BYTES."""

    status = 413


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`value` as a JSON response. Numbers that JSON lacks (infinities) become null."""
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def error_body(status: int, message: str, field: str | None = None, code: str | int | None = None) -> dict[str, Any]:
    """The JSON of an error; `field`: the offending one."""
    kind = _ERROR_TYPES.get(status, "InternalServerError" if status >= 500 else "InvalidRequestError")
    nested = {"message": message, "type": kind, "param": field, "code": code or status}
    return {"object": "error", **nested, "code": status, "error": nested}


def error_response(error: HornbeamError) -> Response:
    """The response to a request that failed."""
    return json_response(_body_of(error), error.status)


def _body_of(error: HornbeamError) -> dict[str, Any]:
    return error_body(error.status, str(error), error.field if isinstance(error, BadRequest) else None)


async def read_json(request: Request, *, optional: bool = False) -> Any:
    """The body. `optional`: an empty one counts as an empty object.

    Raises:
        BadRequest: it is not JSON, or not said to be.
        BodyTooLarge: it is.
        ClientGone: it did not come.
    """
    content_type = request.headers.get("content-type", "")
    if request.scope["path"].startswith("/v1/") and content_type.partition(";")[0].strip() != "application/json":
        raise BadRequest(f"the content-type must be application/json, not {content_type!r}")
    body = await _read_body(request)
    if optional and not body:
        return {}
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error


async def _read_body(request: Request) -> bytes:
    parts, size = [], 0
    try:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes; send a batch in several requests")
    except ClientDisconnect as error:
        raise ClientGone from error
    return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client, whose body must have been read, goes away, that is cancelled, and
    ClientGone raised."""
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    departure = asyncio.create_task(_cancel_at_departure(receive, task))
    try:
        return await work
    except asyncio.CancelledError:
        if not departure.done():
            raise  # somebody else's
        task.uncancel()
        raise ClientGone from None
    finally:
        departure.cancel()


async def _cancel_at_departure(receive: Receive, task: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


async def respond(
    request: Request, answer: AsyncIterator[Any] | Coroutine[Any, Any, Any], close: Callable[[], None]
) -> Response:
    """The response of JSON values as they come, or of one. `close` is called when it is over, however it ends; when the
    client goes away, `answer` is cancelled, and ClientGone raised."""
    if isinstance(answer, AsyncIterator):
        return EventStream(answer, close)
    try:
        return json_response(await while_connected(request.receive, answer))
    finally:
        close()


class EventStream(Response):
    """Server-sent events, ended by `[DONE]`; see `respond`. The first event is awaited before the status line is sent:
    an error until then is raised. A later one becomes an event."""

    def __init__(self, events: AsyncIterator[Any], close: Callable[[], None]) -> None:
        self.raw_headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, as an ASGI application. Raises what the first event raises."""
        try:
            with contextlib.suppress(ClientGone):
                await while_connected(receive, self._send(send, scope[_DIRECT_SEND]))
        finally:
            self._close()

    async def _send(self, start: Send, send: Send) -> None:
        event = await anext(self._events)
        await start({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await send(_frame(orjson.dumps(event)))
            async for event in self._events:
                await send(_frame(orjson.dumps(event)))
        except HornbeamError as error:
            await send(_frame(orjson.dumps(_body_of(error))))
        await send({**_frame(b"[DONE]"), "more_body": False})


def _frame(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}


class DirectSend:
    """ASGI middleware, the outermost: streams send their many events past the others, which look at the start alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        scope[_DIRECT_SEND] = send
        await self._app(scope, receive, send)
