"""How busy the server is, for routers and people: /v1/loads and /get_load."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from hornbeam import __version__
from hornbeam.core.errors import BadRequest
from hornbeam.serve import schemas
from hornbeam.serve.answers import json_response
from hornbeam.serve.app import JSON, TEXT, Route
from hornbeam.serve.fields import Schema
from hornbeam.serve.serving import Serving

PREFIX = "sglang:"  # of metrics' names, as dashboards know them
_RANK = 0  # there is one scheduler


def load_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    loads = _Loads(serving)
    query: dict[str, Schema] = {
        "include": {"type": "string", "description": f"Any of {', '.join(SECTIONS)} and all, with commas."},
        "format": {"enum": ["json", "prometheus"]},
        "dp_rank": {"const": _RANK},
    }
    return (
        Route(
            path="/v1/loads",
            methods=("GET",),
            handler=loads.loads,
            query=query,
            answer=schemas.LOADS,
            media=(JSON, TEXT),
        ),
        Route(path="/get_load", methods=("GET",), handler=loads.load, answer=schemas.LOAD),
    )


def core_numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one scheduler, by the names that routers know.

    Args:
        state: of `Serving.state`.
    """
    total, running = state["max_total_tokens"], state["num_running"]
    return {
        "num_running_reqs": running,
        "num_waiting_reqs": state["num_waiting"],
        "num_used_tokens": state["num_used_tokens"],
        "num_total_tokens": state["num_used_tokens"],
        "max_total_num_tokens": total,
        "token_usage": state["num_used_tokens"] / total,
        "gen_throughput": state["last_gen_throughput"],
        "cache_hit_rate": state["total_cached_tokens"] / max(1, state["total_prompt_tokens"]),
        "utilization": running / state["effective_max_running_requests_per_dp"],
        "max_running_requests": state["effective_max_running_requests_per_dp"],
    }


def _memory(state: Mapping[str, Any]) -> dict[str, Any]:
    names = "num_used_tokens", "num_cached_tokens", "max_total_tokens"
    return {name: state[name] for name in names}


def _queues(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"waiting": state["num_waiting"], "retracted_total": state["total_retractions"]}


SECTIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]] | None] = {  # None: there is no such feature
    "core": core_numbers,
    "memory": _memory,
    "spec": None,
    "lora": None,
    "disagg": None,
    "queues": _queues,
}


class _Loads:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def loads(self, request: Request) -> Response:
        """Requests and tokens in the scheduler; `include` chooses sections, `format=prometheus` gives metrics."""
        query = request.query_params
        wanted = _sections(query.get("include", "all"))
        if query.get("dp_rank", str(_RANK)) != str(_RANK):
            raise BadRequest(f"dp_rank must be {_RANK}: there is one scheduler", "dp_rank")
        form = query.get("format", "json")
        if form not in ("json", "prometheus"):
            raise BadRequest(f"format must be json or prometheus, not {form!r}", "format")
        state = await self._serving.state()
        if form == "prometheus":
            lines = (f'{PREFIX}{name}{{dp_rank="{_RANK}"}} {value}\n' for name, value in core_numbers(state).items())
            return PlainTextResponse("".join(lines))
        load: dict[str, Any] = {"dp_rank": _RANK}
        for name in wanted:
            section = SECTIONS[name]
            if name == "core" and section is not None:
                load |= section(state)
            else:
                load[name] = None if section is None else section(state)
        now = datetime.now(UTC).isoformat()
        return json_response({"timestamp": now, "version": __version__, "loads": [load]})

    async def load(self, request: Request) -> Response:
        """Requests and tokens in the scheduler, in short."""
        state = await self._serving.state()
        return json_response(
            [
                {
                    "dp_rank": _RANK,
                    "num_reqs": state["num_running"] + state["num_waiting"],
                    "num_waiting_reqs": state["num_waiting"],
                    "num_tokens": state["num_used_tokens"],
                    "num_pending_tokens": 0,
                    "ts_tic": time.monotonic(),
                }
            ]
        )


def _sections(include: str) -> list[str]:
    names = [name.strip() for name in include.split(",")]
    for name in names:
        if name not in SECTIONS and name != "all":
            raise BadRequest(f"include must hold {', '.join(SECTIONS)} or all, not {name!r}", "include")
    return list(SECTIONS) if "all" in names else names
