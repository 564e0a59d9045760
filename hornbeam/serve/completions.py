"""/v1/completions: texts that are continued, with the prompt's own text and log-probabilities if they are asked for."""

import codecs
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from hornbeam.core.errors import BadRequest
from hornbeam.core.request import LogprobOptions, TokenLogprobs
from hornbeam.engine.stream import Delta, GenerationRequest, InFlight, Stream, siblings
from hornbeam.serve import schemas
from hornbeam.serve.answers import read_json, respond
from hornbeam.serve.app import EVENTS, JSON, Route
from hornbeam.serve.fields import renaming
from hornbeam.serve.openai import Heading, OpenAiCall, finish_fields, read_call, read_request, usage
from hornbeam.serve.serving import WEIGHT_VERSION, Serving
from hornbeam.serve.tables import COMPLETION
from hornbeam.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
_KIND = "text_completion"
_NAMES = {"text": "prompt", "input_ids": "prompt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall(OpenAiCall):
    """A parsed body of /v1/completions."""

    echo: bool  # the text of a choice begins with the prompt's


def completion_routes(serving: Serving) -> tuple[Route, ...]:
    """The table of paths."""
    return (
        Route(
            path="/v1/completions",
            methods=("POST",),
            handler=_Completions(serving).complete,
            body=COMPLETION,
            answer=schemas.COMPLETION,
            media=(JSON, EVENTS),
        ),
    )


class _Completions:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def complete(self, request: Request) -> Response:
        """Continue one text or several, in one answer or a stream."""
        call = parse_completion(await read_json(request), self._serving)
        frontend = self._serving.frontend
        with renaming(_NAMES):
            stream = await frontend.submit(call.requests)
        answer = CompletionAnswer(call, stream, frontend.tokenizer)
        return await respond(request, answer.chunks() if call.stream else answer.whole(), stream.close)


def parse_completion(body: Any, serving: Serving) -> CompletionCall:
    """Read the body. Raises BadRequest, naming the field."""
    fields = serving.sampling_defaults | COMPLETION.read(body)
    call = read_call(fields, serving)
    echo, num_top = fields.get("echo", False), fields.get("logprobs")
    logprobs = None if num_top is None else LogprobOptions(num_top=num_top, start=0 if echo else None)
    shared = read_request(fields, serving, fields.get("max_tokens", DEFAULT_MAX_TOKENS))
    prompts = _prompts(fields["prompt"])
    requests = [
        GenerationRequest(**prompt, **shared, logprobs=logprobs, rid=_numbered(call["rid"], index, len(prompts)))
        for index, prompt in enumerate(prompts)
    ]
    return CompletionCall(
        requests=tuple(one for request in requests for one in siblings(request, call["num_siblings"])),
        echo=echo,
        **call,
    )


def _prompts(prompt: Any) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"text": prompt}]
    if not prompt:
        raise BadRequest("prompt must not be an empty list", "prompt")
    if isinstance(prompt[0], str):
        return [{"text": text} for text in prompt]
    return [{"token_ids": ids} for ids in ([prompt] if isinstance(prompt[0], int) else prompt)]


def _numbered(rid: str | None, index: int, count: int) -> str | None:
    return rid if rid is None or count == 1 else f"{rid}_{index}"


class CompletionAnswer:
    """Makes the answer to one call, whole or in chunks."""

    def __init__(self, call: CompletionCall, stream: Stream, tokenizer: Tokenizer | None) -> None:
        self._call = call
        self._stream = stream
        self._heading = Heading(call, stream)
        self._choices = [_Choice(entry, index, call, tokenizer) for index, entry in enumerate(stream.requests)]

    async def whole(self) -> dict[str, Any]:
        """The whole answer."""
        deltas = await self._stream.last()
        return {
            **self._heading.of(_KIND),
            "choices": [self._choices[delta.index].part(delta) for delta in deltas],
            "usage": usage(deltas, self._call.num_siblings),
            "metadata": {"weight_version": WEIGHT_VERSION},
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The stream: the texts as they come, and the usage if it was asked for."""
        latest: dict[int, Delta] = {}  # by choice
        async for delta in self._stream:
            latest[delta.index] = delta
            chunk = {**self._heading.of(_KIND), "choices": [self._choices[delta.index].part(delta)]}
            if self._call.continuous_usage:
                chunk["usage"] = usage([delta], 1)
            yield chunk
        if self._call.include_usage:
            deltas = [latest[index] for index in sorted(latest)]
            yield {**self._heading.of(_KIND), "choices": [], "usage": usage(deltas, self._call.num_siblings)}


class _Choice:
    """What has been told of one choice."""

    def __init__(self, entry: InFlight, index: int, call: CompletionCall, tokenizer: Tokenizer | None) -> None:
        self._index = index
        self._tokenizer = tokenizer
        request = call.requests[index]
        self._wants_logprobs = request.logprobs is not None
        self._skipped_ids = tokenizer.special_ids if tokenizer and request.text_options.skip_special_tokens else ()
        self._prompt_ids = entry.prompt_ids if call.echo else ()  # still to be told
        self._prompt_text = request.text
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0  # of the next token in the text, in characters

    def part(self, delta: Delta) -> dict[str, Any]:
        """The next part of the choice, or all of it."""
        prompt_ids, self._prompt_ids = self._prompt_ids, ()
        text = delta.text
        if prompt_ids:
            text = (self._text_of(prompt_ids) if self._prompt_text is None else self._prompt_text) + text
        logprobs = self._logprobs(prompt_ids, delta) if self._wants_logprobs else None
        return {"index": self._index, "text": text, "logprobs": logprobs, **finish_fields(delta)}

    def _text_of(self, token_ids: tuple[int, ...]) -> str:
        return b"".join(map(self._visible_bytes, token_ids)).decode("utf-8", "replace")

    def _visible_bytes(self, token_id: int) -> bytes:
        return (
            b"" if self._tokenizer is None or token_id in self._skipped_ids else self._tokenizer.token_bytes(token_id)
        )

    def _logprobs(self, prompt_ids: tuple[int, ...], delta: Delta) -> dict[str, Any]:
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        # Nothing stands before the prompt's first token that could tell its logprob.
        entries: list[TokenLogprobs | None] = [None, *delta.input_logprobs] if prompt_ids else []
        for token_id, entry in zip((*prompt_ids, *delta.token_ids), (*entries, *delta.logprobs), strict=True):
            told["tokens"].append(self._name(token_id))
            told["text_offset"].append(self._offset)
            self._offset += len(self._utf8.decode(self._visible_bytes(token_id)))
            if entry is None:
                told["token_logprobs"].append(None)
                told["top_logprobs"].append(None)
            else:
                told["token_logprobs"].append(entry.chosen)
                told["top_logprobs"].append(self._likeliest(token_id, entry))
        return told

    def _likeliest(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """By text; where two tokens have the same one, the likelier's. The token that stands there is among them."""
        pairs = sorted({**dict(entry.top), token_id: entry.chosen}.items(), key=lambda pair: pair[1])
        return {self._name(other): logprob for other, logprob in pairs}

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.token_text(token_id)
