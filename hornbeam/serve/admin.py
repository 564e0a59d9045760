"""The routes that operate a running server; they want the admin key where there is one."""

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from hornbeam.core.errors import BadRequest
from hornbeam.core.profile import ProfileOptions
from hornbeam.serve import schemas
from hornbeam.serve.answers import json_response, read_json
from hornbeam.serve.app import TEXT, Route
from hornbeam.serve.serving import Serving
from hornbeam.serve.tables import ABORT, PAUSE, RESUME, START_PROFILE

MAX_FLUSH_SECONDS = 3600.0


def admin_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    admin = _Admin(serving)
    post, both = ("POST",), ("GET", "POST")
    timeout = {"type": "number", "minimum": 0, "maximum": MAX_FLUSH_SECONDS}
    return (
        Route(
            path="/flush_cache",
            methods=both,
            handler=admin.flush_cache,
            admin=True,
            query={"timeout": timeout},
            media=(TEXT,),
        ),
        Route(path="/abort_request", methods=post, handler=admin.abort_request, admin=True, body=ABORT, media=()),
        Route(
            path="/start_profile",
            methods=both,
            handler=admin.start_profile,
            admin=True,
            body=START_PROFILE,
            needs_body=False,
            media=(TEXT,),
        ),
        Route(path="/stop_profile", methods=both, handler=admin.stop_profile, admin=True, media=(TEXT,)),
        Route(
            path="/pause_generation",
            methods=post,
            handler=admin.pause,
            admin=True,
            body=PAUSE,
            needs_body=False,
            answer=schemas.STATUS,
        ),
        Route(
            path="/continue_generation",
            methods=post,
            handler=admin.resume,
            admin=True,
            body=RESUME,
            needs_body=False,
            answer=schemas.STATUS,
        ),
    )


class _Admin:
    def __init__(self, serving: Serving) -> None:
        self._frontend = serving.frontend

    async def flush_cache(self, request: Request) -> Response:
        """Drop the prefix cache, if nothing runs within `timeout` seconds."""
        given = request.query_params.get("timeout", "0")
        try:
            timeout = float(given)
        except ValueError:
            timeout = math.nan
        if not 0 <= timeout <= MAX_FLUSH_SECONDS:
            raise BadRequest(f"timeout must be in 0..{MAX_FLUSH_SECONDS:.0f} seconds, not {given!r}", "timeout")
        if await self._frontend.commands.flush(timeout):
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
        await self._frontend.commands.pause(PAUSE.read(await read_json(request, optional=True)).get("mode", "abort"))
        return json_response({"message": "Generation is paused.", "status": "ok"})

    async def resume(self, request: Request) -> Response:
        """Go on after /pause_generation."""
        RESUME.read(await read_json(request, optional=True))
        await self._frontend.commands.resume()
        return json_response({"message": "Generation continues.", "status": "ok"})

    async def start_profile(self, request: Request) -> Response:
        """Record the engine's steps with torch's profiler; with `num_steps` the answer comes when they are done."""
        body = await read_json(request, optional=True)
        told = await self._frontend.commands.start_profile(read_profile_options(body))
        return PlainTextResponse(f"The profile is in {told['file']}.\n" if "file" in told else "Profiling.\n")

    async def stop_profile(self, request: Request) -> Response:
        """End the profile and say where it is."""
        told = await self._frontend.commands.stop_profile()
        return PlainTextResponse(f"The profile is in {told['file']}.\n")


def read_profile_options(body: Any) -> ProfileOptions:
    """The body of /start_profile. Raises BadRequest, naming the field."""
    fields = START_PROFILE.read(body)
    if "num_steps" in fields:
        fields["num_steps"] = int(fields["num_steps"])
    if "profile_prefix" in fields:
        fields["prefix"] = fields.pop("profile_prefix")
    if "activities" in fields:
        fields["activities"] = tuple(fields["activities"])
    return ProfileOptions(**fields)
