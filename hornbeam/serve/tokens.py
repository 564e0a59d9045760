"""Text to token ids and back over HTTP: /tokenize and /detokenize."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hornbeam.core.errors import BadRequest
from hornbeam.engine.frontend import known_ids
from hornbeam.serve import schemas
from hornbeam.serve.answers import json_response, read_json
from hornbeam.serve.app import Route
from hornbeam.serve.openai import template_variables
from hornbeam.serve.serving import Serving
from hornbeam.serve.tables import DETOKENIZE, TOKENIZE

_NUM_IDS = 2**32  # what the tokenizer's ids are held in


def token_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    tokens = _Tokens(serving)
    return tuple(
        Route(path=f"{prefix}{path}", methods=("POST",), handler=handler, body=body, answer=answer)
        for prefix in ("", "/v1")
        for path, handler, body, answer in (
            ("/tokenize", tokens.tokenize, TOKENIZE, schemas.TOKENS),
            ("/detokenize", tokens.detokenize, DETOKENIZE, schemas.TEXTS),
        )
    )


class _Tokens:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text, of several, or of a chat."""
        fields = TOKENIZE.read(await read_json(request))
        frontend = self._serving.frontend
        context_len = frontend.facts.context_len
        if ("prompt" in fields) == ("messages" in fields):
            raise BadRequest("exactly one of prompt and messages must be given", "prompt")
        prompt: Any = fields.get("prompt")
        if prompt is None:
            prompt = self._render(fields)
        framed = fields.get("add_special_tokens", "prompt" in fields)  # a rendered chat is framed already
        if isinstance(prompt, str):
            ids = await frontend.encode(prompt, framed)
            return json_response({"tokens": ids, "count": len(ids), "max_model_len": context_len})
        rows = [await frontend.encode(text, framed) for text in prompt]
        return json_response({"tokens": rows, "count": list(map(len, rows)), "max_model_len": context_len})

    def _render(self, fields: dict[str, Any]) -> str:
        if self._serving.template is None:
            raise BadRequest("this server has no tokenizer, so it cannot read messages", "messages")
        return self._serving.template.render(
            fields["messages"],
            add_generation_prompt=fields.get("add_generation_prompt", True),
            continue_final_message=fields.get("continue_final_message", False),
            **template_variables(fields.get("chat_template_kwargs", {})),
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, or the texts of several lists of them."""
        fields = DETOKENIZE.read(await read_json(request))
        self._serving.frontend.check_open()
        tokenizer = self._serving.frontend.tokenizer
        if tokenizer is None:
            raise BadRequest("this server has no tokenizer")
        rows: list[Any] = fields["tokens"]
        nested = bool(rows) and isinstance(rows[0], list)
        skips = fields.get("skip_special_tokens", True)
        texts = [tokenizer.decode(known_ids(ids, "tokens", _NUM_IDS), skips) for ids in (rows if nested else [rows])]
        return json_response({"text": texts if nested else texts[0]})
