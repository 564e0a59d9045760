"""The native API: /generate, and what the server tells of its health, its model and its options."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from hornbeam.core.errors import Overloaded
from hornbeam.core.request import SamplingParams
from hornbeam.engine.stream import GenerationRequest
from hornbeam.serve import schemas
from hornbeam.serve.answers import json_response, read_json, respond
from hornbeam.serve.app import EVENTS, JSON, Route
from hornbeam.serve.generate import Answers, parse_generate
from hornbeam.serve.serving import WEIGHT_VERSION, Serving
from hornbeam.serve.tables import GENERATE

PROBE_SECONDS = 20.0
_PROBE = GenerationRequest(token_ids=(0,), sampling=SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True))


def native_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    native = _Native(serving)
    get, generate = ("GET",), ("POST", "PUT")
    return (
        Route(
            path="/generate",
            methods=generate,
            handler=native.generate,
            body=GENERATE,
            answer=schemas.GENERATED,
            media=(JSON, EVENTS),
        ),
        Route(path="/health", methods=get, handler=native.health, media=()),
        Route(path="/health_generate", methods=get, handler=native.health_generate, media=()),
        Route(path="/ping", methods=get, handler=native.health, media=()),
        Route(path="/model_info", methods=get, handler=native.model_info, answer=schemas.MODEL_INFO),
        Route(path="/get_model_info", methods=get, handler=native.model_info, answer=schemas.MODEL_INFO),
        Route(path="/server_info", methods=get, handler=native.server_info, answer=schemas.SERVER_INFO),
        Route(path="/get_server_info", methods=get, handler=native.server_info, answer=schemas.SERVER_INFO),
    )


class _Native:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._frontend = serving.frontend

    async def generate(self, request: Request) -> Response:
        """Generate for one prompt or a batch, in one answer or a stream."""
        options = self._serving.options
        call = parse_generate(await read_json(request), options.stream_interval)
        stream = await self._frontend.submit(call.requests)
        answers = Answers(call, stream, options.incremental_streaming, self._frontend.tokenizer)
        return await respond(request, answers.chunks() if call.stream else answers.whole(), stream.close)

    async def health(self, request: Request) -> Response:
        """200 if requests can be served; answered at once, without asking the engine."""
        self._frontend.check_health()
        return Response()

    async def health_generate(self, request: Request) -> Response:
        """200 if a token can really be generated."""
        stream = await self._frontend.submit([_PROBE])
        try:
            await asyncio.wait_for(stream.last(), PROBE_SECONDS)
        except TimeoutError as error:
            raise Overloaded(f"no token came within {PROBE_SECONDS:.0f} s") from error
        finally:
            stream.close()
        return Response()

    async def model_info(self, request: Request) -> Response:
        """What is served."""
        facts = self._frontend.facts.facts
        return json_response(
            {
                "model_path": self._serving.model_path,
                "tokenizer_path": self._serving.tokenizer_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": WEIGHT_VERSION,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": facts.get("model_type"),
                "architectures": facts.get("architectures"),
            }
        )

    async def server_info(self, request: Request) -> Response:
        """Every option, flat, without the keys; and the scheduler's numbers."""
        return json_response(await self._serving.info())
