"""The API's document (OpenAPI 3.1), made from the table of routes and the tables of fields that check requests; and a
page that shows it."""

import inspect
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from hornbeam import __version__
from hornbeam.serve import schemas
from hornbeam.serve.answers import json_response
from hornbeam.serve.app import EVENTS, HTML, JSON, TEXT, Route
from hornbeam.serve.fields import Schema

_EVERYWHERE = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.INTERNAL_SERVER_ERROR)
_WITH_BODY = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.SERVICE_UNAVAILABLE)
_BODYLESS = ("GET", "HEAD")
_SWAGGER = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5"  # fetched by the reader's browser
_PAGE = f"""<!doctype html>
<title>Hornbeam</title>
<link rel="stylesheet" href="{_SWAGGER}/swagger-ui.css">
<div id="page"></div>
<script src="{_SWAGGER}/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({{url: "openapi.json", dom_id: "#page"}})</script>
"""


def document_routes(routes: Iterable[Route]) -> tuple[Route, ...]:
    """The table of paths that tell of `routes`."""
    description = document(routes)

    async def tell(request: Request) -> Response:
        return json_response(description)

    async def show(request: Request) -> Response:
        return HTMLResponse(_PAGE)

    return (
        Route(path="/openapi.json", methods=("GET",), handler=tell),
        Route(path="/docs", methods=("GET",), handler=show, media=(HTML,)),
    )


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The document as JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        paths[path] = {method.lower(): _operation(route, method, path) for method in route.methods}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Hornbeam", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": schemas.ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(route: Route, method: str, path: str) -> dict[str, Any]:
    statuses = [*_EVERYWHERE, HTTPStatus.SERVICE_UNAVAILABLE, *map(HTTPStatus, route.errors)]
    operation: dict[str, Any] = {
        "summary": inspect.getdoc(route.handler),
        "operationId": f"{method.lower()}{path.translate(str.maketrans('/{.', '___', '}'))}",
        "parameters": [*_path_parameters(path), *_query_parameters(route)],
    }
    if route.body is not None and method not in _BODYLESS:
        statuses += _WITH_BODY
        content = {JSON: {"schema": route.body.schema}}
        operation["requestBody"] = {"required": bool(route.body.required) or route.needs_body, "content": content}
    operation["responses"] = {
        "200": {
            "description": "OK",
            "content": {media: {"schema": _schema(route, media)} for media in route.media},
        }
    } | {str(status.value): _error(status, route) for status in sorted(set(statuses))}
    return operation


def _schema(route: Route, media: str) -> Schema:
    if media == EVENTS:
        return {"description": "Server-sent events. The data of each is JSON; that of the last is [DONE]."}
    return route.answer if media == JSON else schemas.STRING


def _path_parameters(path: str) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": schemas.STRING} for name in names]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()]


def _error(status: HTTPStatus, route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    if TEXT in route.media:
        content[TEXT] = {"schema": schemas.STRING}
    return {"description": status.phrase, "content": content}
