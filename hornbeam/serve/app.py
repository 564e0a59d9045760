"""The HTTP application: routes as data, keys, errors in one shape. Knows no engine and no model.

A plain ASGI application: each layer of a framework costs every request of a stream of short ones.
"""

import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hornbeam.core.errors import HornbeamError
from hornbeam.serve.answers import ClientGone, error_body, error_response, gone_response, json_response
from hornbeam.serve.fields import Api, Schema

logger = logging.getLogger(__name__)

JSON, EVENTS, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
_OPEN_PREFIXES = ("/health", "/metrics")  # for probes, whatever keys there are
_REST = ":path}"  # ends the paths of routes whose last part may be anything
_ANY_ORIGIN = (b"access-control-allow-origin", b"*")  # browsers may call from everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One path of an API, and what its document says of it."""

    path: str  # may end with a parameter that takes the rest, "{name:path}"
    methods: tuple[str, ...]
    handler: Callable[..., Awaitable[Response]]
    admin: bool = False  # wants the admin key where there is one
    body: Api | None = None  # of methods that take one
    needs_body: bool = True  # else an empty body is an empty object
    query: Mapping[str, Schema] = field(default_factory=dict)
    answer: Schema = field(default_factory=dict)  # where it is JSON
    media: tuple[str, ...] = (JSON,)  # of the answer
    errors: tuple[int, ...] = ()  # besides those that every route may answer


class HttpApp:
    """An ASGI application that serves `routes`, guarded by the keys that are given.

    Normal paths need `api_key`; admin paths need `admin_api_key`, or `api_key` where that is the only key.
    """

    def __init__(self, routes: Iterable[Route], api_key: str | None = None, admin_api_key: str | None = None) -> None:
        self.routes = {route.path: route for route in routes}
        self._prefixes = {path.partition("{")[0]: path for path in self.routes if path.endswith(_REST)}
        self._api_key = api_key
        self._admin_api_key = admin_api_key
        self._preflight = CORSMiddleware(self._respond, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await (self._preflight if scope["method"] == "OPTIONS" else self._respond)(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _send(await self._handle(scope, receive, send), scope, receive, send)
            return
        except HornbeamError as error:
            response = error_response(error)
        except ClientGone:
            response = gone_response()
        except Exception as error:  # if the response has begun, the server refuses another and closes the connection
            logger.exception("%s %s failed", scope["method"], scope["path"])
            response = json_response(error_body(500, f"internal server error: {type(error).__name__}"), 500)
        await _send(response, scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> Response:
        path: str = scope["path"]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        route = self.routes.get(path) or self._route_with_rest(scope)
        if not self._allows(route, scope):
            message = "Unauthorized: send the key as 'Authorization: Bearer <key>'"
            return json_response(error_body(401, message), 401, {"www-authenticate": "Bearer"})
        if route is None:
            return json_response(error_body(404, f"Not Found: {scope['method']} {path}"), 404)
        if method not in route.methods:
            message = f"Method Not Allowed: {scope['method']} {path}"
            return json_response(error_body(405, message), 405, {"allow": ", ".join(route.methods)})
        return await route.handler(Request(scope, receive, send))

    def _route_with_rest(self, scope: Scope) -> Route | None:
        path: str = scope["path"]
        for prefix, template in self._prefixes.items():
            if path.startswith(prefix):
                scope["path_params"] = {template[len(prefix) + 1 : -len(_REST)]: path[len(prefix) :]}
                return self.routes[template]
        return None

    def _allows(self, route: Route | None, scope: Scope) -> bool:
        key = (self._admin_api_key or self._api_key) if route is not None and route.admin else self._api_key
        if key is None or scope["path"].startswith(_OPEN_PREFIXES) or scope["method"] == "OPTIONS":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + key.encode())


async def _send(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    response.raw_headers.append(_ANY_ORIGIN)
    await response(scope, receive, send)
