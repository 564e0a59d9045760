"""The native API: /generate and the routes that operate the server."""

import asyncio
import math

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from hornbeam.core.errors import BadRequest, Overloaded
from hornbeam.core.request import SamplingParams
from hornbeam.engine.stream import GenerationRequest
from hornbeam.serve.answers import EventStream, json_response, read_json, respond
from hornbeam.serve.app import Route
from hornbeam.serve.fields import ABORT, PAUSE, RESUME
from hornbeam.serve.generate import WEIGHT_VERSION, Answers, parse_generate
from hornbeam.serve.serving import Serving

PROBE_SECONDS = 20.0
MAX_FLUSH_SECONDS = 3600.0
_PROBE = GenerationRequest(token_ids=(0,), sampling=SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True))


def native_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    native = _Native(serving)
    get, both = ("GET",), ("GET", "POST")
    return (
        Route(path="/generate", methods=("POST", "PUT"), handler=native.generate),
        Route(path="/health", methods=get, handler=native.health),
        Route(path="/health_generate", methods=get, handler=native.health_generate),
        Route(path="/model_info", methods=get, handler=native.model_info),
        Route(path="/get_model_info", methods=get, handler=native.model_info),
        Route(path="/server_info", methods=get, handler=native.server_info),
        Route(path="/get_server_info", methods=get, handler=native.server_info),
        Route(path="/flush_cache", methods=both, handler=native.flush_cache, admin=True),
        Route(path="/abort_request", methods=("POST",), handler=native.abort_request, admin=True),
        Route(path="/pause_generation", methods=("POST",), handler=native.pause, admin=True),
        Route(path="/continue_generation", methods=("POST",), handler=native.resume, admin=True),
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
        if call.stream:
            return EventStream(answers.chunks(), stream.close)
        try:
            return await respond(request, answers.whole())
        finally:
            stream.close()

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

    async def flush_cache(self, request: Request) -> Response:
        """Drop the prefix cache, if nothing runs within `timeout` seconds."""
        given = request.query_params.get("timeout", "0")
        try:
            timeout = float(given)
        except ValueError:
            timeout = math.nan
        if not 0 <= timeout <= MAX_FLUSH_SECONDS:
            raise BadRequest(f"timeout must be in 0..{MAX_FLUSH_SECONDS:.0f} seconds, not {given!r}", "timeout")
        if await self._frontend.flush(timeout):
            return PlainTextResponse("The cache is flushed.\n")
        return PlainTextResponse("The cache is not flushed: requests are running or waiting.\n", 400)

    async def abort_request(self, request: Request) -> Response:
        """End one request by its id, or all."""
        fields = ABORT.read(await read_json(request))
        if fields.get("abort_all", False):
            self._frontend.abort_all()
        elif "rid" in fields:
            self._frontend.abort(fields["rid"])
        else:
            raise BadRequest("rid or abort_all must be given", "rid")
        return Response()

    async def pause(self, request: Request) -> Response:
        """Run nothing until /continue_generation; `mode` says what becomes of the running requests."""
        await self._frontend.pause(PAUSE.read(await read_json(request)).get("mode", "abort"))
        return json_response({"message": "Generation is paused.", "status": "ok"})

    async def resume(self, request: Request) -> Response:
        """Go on after /pause_generation."""
        RESUME.read(await read_json(request))
        await self._frontend.resume()
        return json_response({"message": "Generation continues.", "status": "ok"})
