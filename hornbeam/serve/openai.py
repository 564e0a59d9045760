"""The OpenAI API: chats, and what chats and completions share of fields and answers."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hornbeam.core.errors import BadRequest
from hornbeam.core.request import LogprobOptions, TokenLogprobs
from hornbeam.engine.stream import Delta, GenerationRequest, Stream, siblings
from hornbeam.serve import schemas
from hornbeam.serve.answers import read_json, respond
from hornbeam.serve.app import EVENTS, JSON, Route
from hornbeam.serve.fields import OPENAI_NAMES, read_num_siblings, read_sampling, read_text_options, renaming
from hornbeam.serve.serving import WEIGHT_VERSION, Serving
from hornbeam.serve.tables import CHAT, STREAM_OPTIONS
from hornbeam.text.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 20
_CHUNK = "chat.completion.chunk"


def openai_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    openai = _OpenAi(serving)
    return (
        Route(
            path="/v1/chat/completions",
            methods=("POST",),
            handler=openai.chat,
            body=CHAT,
            answer=schemas.CHAT_COMPLETION,
            media=(JSON, EVENTS),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAiCall:
    """A parsed body."""

    requests: tuple[GenerationRequest, ...]  # one per choice, those of one prompt side by side
    num_siblings: int  # choices per prompt
    model: str  # echoed
    rid: str | None  # the answer's id; None: that of its first request
    stream: bool
    include_usage: bool  # a last chunk of the stream holds the usage
    continuous_usage: bool  # every chunk does


class _OpenAi:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def chat(self, request: Request) -> Response:
        """Generate the next message of a chat, in one answer or a stream."""
        body = await read_json(request)
        frontend = self._serving.frontend
        frontend.check_open()  # before the template is asked for
        call = parse_chat(body, self._serving)
        with renaming({"text": "messages"}):
            stream = await frontend.submit(call.requests)
        answer = ChatAnswer(call, stream, frontend.tokenizer)
        return await respond(request, answer.chunks() if call.stream else answer.completion(), stream.close)


def parse_chat(body: Any, serving: Serving) -> OpenAiCall:
    """Read the body of /v1/chat/completions and render its messages.

    Raises:
        BadRequest: names the field.
    """
    fields = serving.sampling_defaults | CHAT.read(body)
    if serving.template is None:
        raise BadRequest("this server has no tokenizer, so it cannot read messages; send input_ids to /generate")
    call = read_call(fields, serving)
    logprobs, top_logprobs = fields.get("logprobs", False), fields.get("top_logprobs", 0)
    if top_logprobs > MAX_TOP_LOGPROBS or (top_logprobs and not logprobs):
        raise BadRequest(f"top_logprobs must be at most {MAX_TOP_LOGPROBS}, and needs logprobs: true", "top_logprobs")
    prompt = serving.template.render(
        fields["messages"],
        continue_final_message=fields.get("continue_final_message", False),
        **template_variables(fields.get("chat_template_kwargs", {})),
    )
    request = GenerationRequest(
        text=prompt,
        add_special_tokens=False,
        rid=call["rid"],
        logprobs=LogprobOptions(num_top=top_logprobs) if logprobs else None,
        **read_request(fields, serving, fields.get("max_completion_tokens", fields.get("max_tokens"))),
    )
    return OpenAiCall(requests=siblings(request, call["num_siblings"]), **call)


def template_variables(given: dict[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs`. Raises BadRequest for what the template gets otherwise."""
    reserved = {"messages", "tools", "continue_final_message", "add_generation_prompt"} & given.keys()
    if reserved:
        raise BadRequest(f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}", "chat_template_kwargs")
    return given


class ChatAnswer:
    """Makes the completion of one chat, or the chunks of its stream."""

    def __init__(self, call: OpenAiCall, stream: Stream, tokenizer: Tokenizer | None) -> None:
        assert tokenizer is not None, "a chat was rendered"
        self._call = call
        self._stream = stream
        self._tokenizer = tokenizer
        self._heading = Heading(call, stream)

    async def completion(self) -> dict[str, Any]:
        """The whole answer."""
        deltas = await self._stream.last()
        return {
            **self._heading.of("chat.completion"),
            "choices": [self._choice(delta) for delta in deltas],
            "usage": usage(deltas, self._call.num_siblings),
            "metadata": {"weight_version": WEIGHT_VERSION},
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "reasoning_content": None, "tool_calls": None}
        return {"index": delta.index, "message": message, "logprobs": self._logprobs(delta), **finish_fields(delta)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The stream: the role, the text as it comes, then why it ended, and the usage if it was asked for."""
        latest: dict[int, Delta] = {}  # by choice
        async for delta in self._stream:
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
            deltas = list(latest.values())
            yield {**self._heading.of(_CHUNK), "choices": [], "usage": usage(deltas, self._call.num_siblings)}

    def _chunk(
        self, delta: Delta, content: dict[str, Any], logprobs: dict[str, Any] | None = None, finished: bool = False
    ) -> dict[str, Any]:
        finish = finish_fields(delta) if finished else {"finish_reason": None, "matched_stop": None}
        choice = {"index": delta.index, "delta": content, "logprobs": logprobs, **finish}
        chunk = {**self._heading.of(_CHUNK), "choices": [choice]}
        if self._call.continuous_usage:
            chunk["usage"] = usage([delta], 1)
        return chunk

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


# What completions use, too.


def read_request(fields: Mapping[str, Any], serving: Serving, max_new_tokens: int | None) -> dict[str, Any]:
    """The shared fields as those of a GenerationRequest. Raises BadRequest, naming the field."""
    return {
        "sampling": read_sampling(fields, OPENAI_NAMES, max_new_tokens),
        "text_options": read_text_options(fields),
        "namespace": fields.get("extra_key", fields.get("cache_salt", "")),
        "priority": fields.get("priority"),
        "routing_key": fields.get("routing_key"),
        "stream_interval": serving.options.stream_interval if fields.get("stream", False) else None,
    }


def read_call(fields: Mapping[str, Any], serving: Serving) -> dict[str, Any]:
    """The shared fields as those of an OpenAiCall, but for its requests. Raises BadRequest, naming the field."""
    stream_options = STREAM_OPTIONS.read(fields.get("stream_options", {}))
    return {
        "num_siblings": read_num_siblings(fields),
        "model": fields.get("model", serving.options.served_model_name),
        "rid": fields.get("rid"),
        "stream": fields.get("stream", False),
        "include_usage": stream_options.get("include_usage", False),
        "continuous_usage": stream_options.get("continuous_usage_stats", False),
    }


class Heading:
    """The fields that every object of one answer begins with."""

    def __init__(self, call: OpenAiCall, stream: Stream) -> None:
        self._fields = {"id": call.rid or stream.rids[0], "created": int(time.time()), "model": call.model}

    def of(self, kind: str) -> dict[str, Any]:
        """For an object of this kind."""
        return {**self._fields, "object": kind}


def finish_fields(delta: Delta) -> dict[str, Any]:
    """Why a choice ended; nulls while it has not."""
    if delta.finish is None:
        return {"finish_reason": None, "matched_stop": None}
    return {"finish_reason": delta.finish.type, "matched_stop": delta.finish.matched}


def usage(deltas: Sequence[Delta], num_siblings: int) -> dict[str, Any]:
    """Of choices in their order, of which each `num_siblings` have one prompt."""
    prompts = [deltas[start : start + num_siblings] for start in range(0, len(deltas), num_siblings)]
    num_prompt = sum(siblings[0].num_prompt for siblings in prompts)
    num_generated = sum(delta.num_generated for delta in deltas)
    num_cached = sum(min(delta.num_cached for delta in siblings) for siblings in prompts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "reasoning_tokens": 0,
    }
