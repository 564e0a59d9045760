"""Every route that a server has."""

from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from hornbeam.config.components import ServeOptions
from hornbeam.serve.admin import admin_routes
from hornbeam.serve.app import Route, create_app
from hornbeam.serve.completions import completion_routes
from hornbeam.serve.loads import load_routes
from hornbeam.serve.models import model_routes
from hornbeam.serve.native import native_routes
from hornbeam.serve.openai import openai_routes
from hornbeam.serve.openapi import document_routes
from hornbeam.serve.serving import Serving
from hornbeam.serve.tokens import token_routes

if TYPE_CHECKING:
    from hornbeam.serve.metrics import Metrics


def create_metrics(options: ServeOptions) -> "Metrics | None":
    """What keeps account for /metrics, if that is served."""
    if not options.enable_metrics:
        return None
    from hornbeam.serve.metrics import Metrics

    return Metrics(options.served_model_name)


def server_routes(serving: Serving, metrics: "Metrics | None" = None) -> tuple[Route, ...]:
    """All that have to do with `serving`; and with `metrics`, if there are any."""
    routes: tuple[Route, ...] = (
        *native_routes(serving),  # the busiest ones first: they are looked through in order
        *openai_routes(serving),
        *completion_routes(serving),
        *admin_routes(serving),
        *load_routes(serving),
        *model_routes(serving),
        *token_routes(serving),
    )
    if metrics is not None:
        from hornbeam.serve.metrics import metrics_routes

        routes += metrics_routes(serving, metrics)
    return routes


def create_server_app(serving: Serving, metrics: "Metrics | None" = None) -> ASGIApp:
    """The application that serves `serving`, and its document; requests are counted in `metrics`, if there are any."""
    routes = server_routes(serving, metrics)
    app = create_app((*routes, *document_routes(routes)), serving.options.api_key, serving.options.admin_api_key)
    if metrics is None:
        return app
    from hornbeam.serve.metrics import HttpMetrics

    return HttpMetrics(app, metrics=metrics, paths=frozenset(route.path for route in routes))
