"""What every HTTP API here shares: JSON bodies in, JSON or server-sent events out, errors in one shape.

An error's body carries both forms that clients look for: flat fields and a nested `error`.
"""

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
_CLIENT_CLOSED_REQUEST = 499  # for logs; nobody receives it


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
    if request.url.path.startswith("/v1/") and content_type.partition(";")[0].strip() != "application/json":
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
    """The result of `work`, which is cancelled when the client goes away. The body must have been read.

    Raises:
        ClientGone: it did, before the result was there.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait((task, departure), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        departure.cancel()
        await asyncio.gather(task, departure, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """The JSON result of `work` as a response; `work` is cancelled when the client goes away."""
    try:
        return json_response(await while_connected(request.receive, work))
    except ClientGone:
        return gone_response()


def gone_response() -> Response:
    """To a client that has gone away."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


class EventStream(Response):
    """Server-sent events, ended by `[DONE]`.

    The first event is awaited before the status line is sent, so an error until then is a plain HTTP error. A later
    one becomes an event.

    Args:
        events: JSON values.
        close: called when it is over, however it ends: the client may go away at any time.
    """

    def __init__(self, events: AsyncIterator[Any], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, as an ASGI application."""
        try:
            with contextlib.suppress(ClientGone):
                await while_connected(receive, self._send(scope, receive, send))
        finally:
            self._close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            event = await anext(self._events)
        except HornbeamError as error:
            await error_response(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        send = scope[_DIRECT_SEND]
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
