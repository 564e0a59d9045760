"""The OpenAI API: models and chat completions."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hornbeam.core.errors import BadRequest
from hornbeam.core.request import LogprobOptions, TokenLogprobs
from hornbeam.engine.stream import Delta, GenerationRequest, Stream, siblings
from hornbeam.serve.answers import EventStream, error_body, json_response, read_json, respond
from hornbeam.serve.app import Route
from hornbeam.serve.fields import (
    CHAT,
    OPENAI_NAMES,
    STREAM_OPTIONS,
    read_num_siblings,
    read_sampling,
    read_text_options,
)
from hornbeam.serve.generate import WEIGHT_VERSION
from hornbeam.serve.serving import Serving
from hornbeam.text.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 20


def openai_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    openai = _OpenAi(serving)
    return (
        Route(path="/v1/models", methods=("GET",), handler=openai.models),
        Route(path="/v1/models/{model:path}", methods=("GET",), handler=openai.model),
        Route(path="/v1/chat/completions", methods=("POST",), handler=openai.chat),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """A parsed body of /v1/chat/completions."""

    requests: tuple[GenerationRequest, ...]  # one per choice
    model: str  # echoed
    stream: bool
    include_usage: bool  # a last chunk of the stream holds the usage
    continuous_usage: bool  # every chunk does


class _OpenAi:
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

    async def chat(self, request: Request) -> Response:
        """Generate the next message of a chat, in one answer or a stream."""
        body = await read_json(request)
        frontend = self._serving.frontend
        frontend.check_open()  # before the template is asked for
        call = parse_chat(body, self._serving)
        stream = await frontend.submit(call.requests)
        answer = ChatAnswer(body.get("rid") or stream.rids[0], call, frontend.tokenizer)
        if call.stream:
            return EventStream(answer.chunks(stream), stream.close)
        try:
            return await respond(request, answer.completion(stream))
        finally:
            stream.close()


def parse_chat(body: Any, serving: Serving) -> ChatCall:
    """Read the body of /v1/chat/completions and render its messages.

    Raises:
        BadRequest: names the field.
    """
    fields = serving.sampling_defaults | CHAT.read(body)
    if "messages" not in fields:
        raise BadRequest("messages must be given", "messages")
    if serving.template is None:
        raise BadRequest("this server has no tokenizer, so it cannot read messages; send input_ids to /generate")
    stream_options = STREAM_OPTIONS.read(fields.get("stream_options", {}))
    stream, logprobs = fields.get("stream", False), fields.get("logprobs", False)
    top_logprobs = fields.get("top_logprobs", 0)
    if top_logprobs > MAX_TOP_LOGPROBS or (top_logprobs and not logprobs):
        raise BadRequest(f"top_logprobs must be at most {MAX_TOP_LOGPROBS}, and needs logprobs: true", "top_logprobs")
    prompt = serving.template.render(
        fields["messages"],
        continue_final_message=fields.get("continue_final_message", False),
        **_template_variables(fields.get("chat_template_kwargs", {})),
    )
    request = GenerationRequest(
        text=prompt,
        add_special_tokens=False,
        sampling=read_sampling(fields, OPENAI_NAMES, fields.get("max_completion_tokens", fields.get("max_tokens"))),
        text_options=read_text_options(fields),
        rid=fields.get("rid"),
        namespace=fields.get("extra_key", fields.get("cache_salt", "")),
        priority=fields.get("priority"),
        routing_key=fields.get("routing_key"),
        logprobs=LogprobOptions(num_top=top_logprobs) if logprobs else None,
        stream_interval=serving.options.stream_interval if stream else None,
    )
    return ChatCall(
        requests=siblings(request, read_num_siblings(fields)),
        model=fields.get("model", serving.options.served_model_name),
        stream=stream,
        include_usage=stream_options.get("include_usage", False),
        continuous_usage=stream_options.get("continuous_usage_stats", False),
    )


def _template_variables(given: dict[str, Any]) -> dict[str, Any]:
    reserved = {"messages", "tools", "continue_final_message"} & given.keys()
    if reserved:
        raise BadRequest(f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}", "chat_template_kwargs")
    return given


class ChatAnswer:
    """Makes the completion of one chat, or the chunks of its stream."""

    def __init__(self, rid: str, call: ChatCall, tokenizer: Tokenizer | None) -> None:
        assert tokenizer is not None, "a chat was rendered"
        self._rid = rid
        self._call = call
        self._tokenizer = tokenizer
        self._created = int(time.time())

    async def completion(self, stream: Stream) -> dict[str, Any]:
        """The whole answer."""
        deltas = await stream.last()
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(delta) for delta in deltas],
            "usage": _usage(deltas),
            "metadata": {"weight_version": WEIGHT_VERSION},
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "reasoning_content": None, "tool_calls": None}
        return {"index": delta.index, "message": message, "logprobs": self._logprobs(delta), **_finish(delta)}

    async def chunks(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[dict[str, Any]]:
        """The stream: the role, the text as it comes, then why it ended, and the usage if it was asked for."""
        latest: dict[int, Delta] = {}  # by choice
        async for delta in deltas:
            first = delta.index not in latest
            latest[delta.index] = delta
            if first:
                yield self._chunk(delta, {"role": "assistant", "content": "", "reasoning_content": None})
            logprobs = self._logprobs(delta)
            if delta.text or (logprobs and delta.token_ids):
                yield self._chunk(delta, {"content": delta.text, "reasoning_content": None}, logprobs)
            if delta.finish is not None:
                yield self._chunk(delta, {"reasoning_content": None}, finished=True)
        if self._call.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage([*latest.values()])}

    def _chunk(
        self, delta: Delta, content: dict[str, Any], logprobs: dict[str, Any] | None = None, finished: bool = False
    ) -> dict[str, Any]:
        finish = _finish(delta) if finished else {"finish_reason": None, "matched_stop": None}
        choice = {"index": delta.index, "delta": content, "logprobs": logprobs, **finish}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._call.continuous_usage:
            chunk["usage"] = _usage([delta])
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._rid, "object": kind, "created": self._created, "model": self._call.model}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._call.requests[delta.index].logprobs is None:
            return None
        return {"content": list(map(self._token_logprobs, delta.token_ids, delta.logprobs))}

    def _token_logprobs(self, token_id: int, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(top_id, logprob) for top_id, logprob in entry.top]
        return {**self._token(token_id, entry.chosen), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
            "logprob": logprob,
        }


def _finish(delta: Delta) -> dict[str, Any]:
    assert delta.finish is not None
    return {"finish_reason": delta.finish.type, "matched_stop": delta.finish.matched}


def _usage(deltas: Sequence[Delta]) -> dict[str, Any]:
    """Of all choices; they have one prompt."""
    num_prompt, num_generated = deltas[0].num_prompt, sum(delta.num_generated for delta in deltas)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": min(delta.num_cached for delta in deltas)},
        "reasoning_tokens": 0,
    }
