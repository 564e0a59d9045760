"""The OpenAI API's list of models: the one that is served."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hornbeam.serve import schemas
from hornbeam.serve.answers import error_body, json_response
from hornbeam.serve.app import Route
from hornbeam.serve.serving import Serving


def model_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    models = _Models(serving)
    return (
        Route(path="/v1/models", methods=("GET",), handler=models.models, answer=schemas.MODELS),
        Route(
            path="/v1/models/{model:path}",
            methods=("GET",),
            handler=models.model,
            answer=schemas.MODEL,
            errors=(404,),
        ),
    )


class _Models:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        """The one model."""
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """The model, if it has this name."""
        name, served = request.path_params["model"], self._serving.options.served_model_name
        if name == served:
            return json_response(self._card())
        message = f"there is no model {name!r}; this server serves {served!r}"
        return json_response(error_body(404, message, "model", "model_not_found"), 404)

    def _card(self) -> dict[str, Any]:
        name = self._serving.options.served_model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "hornbeam",
            "root": name,
            "parent": None,
            "max_model_len": self._serving.frontend.facts.context_len,
        }
