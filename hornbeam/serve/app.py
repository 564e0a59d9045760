"""The HTTP application: routes as data, authentication, errors in one shape. Knows no engine and no model."""

import hmac
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from starlette import routing
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hornbeam.core.errors import HornbeamError
from hornbeam.serve.answers import ClientGone, DirectSend, error_body, error_response, json_response
from hornbeam.serve.fields import Api, Schema

JSON, EVENTS, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
_CLIENT_CLOSED_REQUEST = 499  # for logs; nobody receives it
_OPEN_PREFIXES = ("/health", "/metrics")  # for probes, whatever keys there are


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One path of an API, and what its document says of it."""

    path: str
    methods: tuple[str, ...]
    handler: Callable[..., Awaitable[Response]]
    admin: bool = False  # wants the admin key where there is one
    body: Api | None = None  # of methods that take one
    needs_body: bool = True  # else an empty body is an empty object
    query: Mapping[str, Schema] = field(default_factory=dict)
    answer: Schema = field(default_factory=dict)  # where it is JSON
    media: tuple[str, ...] = (JSON,)  # of the answer
    errors: tuple[int, ...] = ()  # besides those that every route may answer


def create_app(routes: Iterable[Route], api_key: str | None = None, admin_api_key: str | None = None) -> Starlette:
    """An application that serves `routes`, guarded by the keys that are given."""
    routes = tuple(routes)
    middleware = [
        Middleware(DirectSend),
        Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]),
    ]
    if api_key is not None or admin_api_key is not None:
        admin_paths = frozenset(route.path for route in routes if route.admin)
        keys = {"api_key": api_key, "admin_api_key": admin_api_key}
        middleware.append(Middleware(Authentication, admin_paths=admin_paths, **keys))
    app = Starlette(
        routes=[routing.Route(route.path, route.handler, methods=list(route.methods)) for route in routes],
        middleware=middleware,
        exception_handlers={
            HornbeamError: _on_hornbeam_error,
            HTTPException: _on_http_error,
            ClientGone: _on_departure,
            Exception: _on_bug,
        },
    )
    app.router.redirect_slashes = False
    return app


class Authentication:
    """ASGI middleware: bearer keys, compared in constant time.

    Normal paths need `api_key`; admin paths need `admin_api_key`, or `api_key` where that is the only key.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, admin_api_key: str | None, admin_paths: frozenset[str]
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._admin_api_key = admin_api_key
        self._admin_paths = admin_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and not self._allows(scope):
            message = "Unauthorized: send the key as 'Authorization: Bearer <key>'"
            response = json_response(error_body(401, message), 401, {"www-authenticate": "Bearer"})
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if scope["method"] == "OPTIONS" or path.startswith(_OPEN_PREFIXES):
            return True
        key = (self._admin_api_key or self._api_key) if path in self._admin_paths else self._api_key
        if key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + key.encode())


async def _on_hornbeam_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HornbeamError)
    return error_response(error)


async def _on_departure(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return json_response(error_body(error.status_code, message), error.status_code, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    """The framework logs the traceback."""
    return json_response(error_body(500, f"internal server error: {type(error).__name__}"), 500)
