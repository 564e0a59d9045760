"""Every route that a server has."""

from fastapi import FastAPI

from hornbeam.serve.admin import admin_routes
from hornbeam.serve.app import create_app
from hornbeam.serve.completions import completion_routes
from hornbeam.serve.loads import load_routes
from hornbeam.serve.native import native_routes
from hornbeam.serve.openai import openai_routes
from hornbeam.serve.openapi import document
from hornbeam.serve.serving import Serving
from hornbeam.serve.tokens import token_routes


def create_server_app(serving: Serving) -> FastAPI:
    """The application that serves `serving`, with its document."""
    routes = (
        *native_routes(serving),
        *admin_routes(serving),
        *load_routes(serving),
        *openai_routes(serving),
        *completion_routes(serving),
        *token_routes(serving),
    )
    app = create_app(routes, serving.options.api_key, serving.options.admin_api_key)
    description = document(routes)
    app.openapi = lambda: description  # type: ignore[method-assign]
    return app
