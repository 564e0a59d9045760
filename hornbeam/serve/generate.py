"""The language of /generate, which `hornbeam.Engine` speaks too: from JSON to requests, from deltas to JSON.

Knows no HTTP.
"""

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from hornbeam.core.errors import BadRequest
from hornbeam.core.request import Finish, LogprobOptions
from hornbeam.engine.stream import Delta, GenerationRequest, InFlight, Stream, siblings
from hornbeam.serve.fields import GENERATE_NAMES, read_num_siblings, read_sampling, read_text_options
from hornbeam.serve.logprobs import LogprobAnswer
from hornbeam.serve.serving import WEIGHT_VERSION
from hornbeam.serve.tables import GENERATE, SAMPLING
from hornbeam.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A parsed body. `batched`: the answer is a list, though it may have one element."""

    requests: tuple[GenerationRequest, ...]
    batched: bool
    stream: bool
    text_in_logprobs: bool
    returns_prompt_ids: bool


def parse_generate(body: Any, default_interval: int) -> GenerateCall:
    """Read the body of /generate.

    Args:
        body: the JSON value.
        default_interval: tokens between two chunks of a stream that does not say.

    Raises:
        BadRequest: names the field.
    """
    fields = GENERATE.read(body)
    texts: Any = fields.get("text")
    ids: Any = fields.get("input_ids")
    if (texts is None) == (ids is None):
        raise BadRequest("exactly one of text and input_ids must be given", "text" if ids is None else "input_ids")
    prompts: list[dict[str, Any]]
    if ids is None:
        batched = isinstance(texts, list)
        prompts = [{"text": text} for text in (texts if batched else [texts])]
    else:
        batched = bool(ids) and isinstance(ids[0], list)
        prompts = [{"token_ids": row} for row in (ids if batched else [ids])]
    if not prompts:
        raise BadRequest("text must not be an empty list", "text")
    stream, count = fields.get("stream", False), len(prompts)
    samplings = _samplings(fields, count, default_interval if stream else None)
    nums = {num for _, num in samplings}
    if len(nums) > 1:
        raise BadRequest("n must be the same for all prompts of a batch", "n")
    own = {
        "rid": _rids(fields.get("rid"), count),
        "logprobs": _logprobs(fields, count),
        "namespace": _spread(fields, "extra_key", count, ""),
        "priority": _spread(fields, "priority", count, None),
        "routing_key": _spread(fields, "routing_key", count, None),
    }
    requests = [
        GenerationRequest(**prompt, **sampling, **{name: values[index] for name, values in own.items()})
        for index, (prompt, (sampling, _)) in enumerate(zip(prompts, samplings, strict=True))
    ]
    num = nums.pop()
    return GenerateCall(
        requests=tuple(sibling for request in requests for sibling in siblings(request, num)),
        batched=batched or num > 1,
        stream=stream,
        text_in_logprobs=fields.get("return_text_in_logprobs", False),
        returns_prompt_ids=fields.get("return_prompt_token_ids", False),
    )


def parse_sampling(params: Any, interval: int | None) -> tuple[dict[str, Any], int]:
    """`sampling_params` as fields of a GenerationRequest, and how many generations each prompt gets.

    Args:
        params: the JSON object.
        interval: tokens between two chunks of a stream that does not say; None: it is no stream.

    Raises:
        BadRequest: names the field.
    """
    fields = SAMPLING.read(params)
    until_end = "max_new_tokens" in params and params["max_new_tokens"] is None
    own_interval = fields.get("stream_interval", 1)
    if own_interval < 1:
        raise BadRequest("stream_interval must be at least 1", "stream_interval")
    values = {
        "sampling": read_sampling(fields, GENERATE_NAMES, None if until_end else fields.get("max_new_tokens", 128)),
        "text_options": read_text_options(fields),
        "stream_interval": None if interval is None else fields.get("stream_interval", interval),
    }
    return values, read_num_siblings(fields)


def _samplings(fields: Mapping[str, Any], count: int, interval: int | None) -> list[tuple[dict[str, Any], int]]:
    given = fields.get("sampling_params", {})
    if isinstance(given, list):
        return [parse_sampling(params, interval) for params in _spread(fields, "sampling_params", count, {})]
    return [parse_sampling(given, interval)] * count


def _logprobs(fields: Mapping[str, Any], count: int) -> list[LogprobOptions | None]:
    token_ids = fields.get("token_ids_logprob", [])
    shared = not token_ids or not isinstance(token_ids[0], list)
    wanted = zip(
        _spread(fields, "return_logprob", count, False),
        _spread(fields, "logprob_start_len", count, -1),
        _spread(fields, "top_logprobs_num", count, 0),
        [token_ids] * count if shared else _spread(fields, "token_ids_logprob", count, []),
        strict=True,
    )
    return [
        LogprobOptions(num_top=num_top, token_ids=tuple(ids), start=None if start == -1 else start) if wants else None
        for wants, start, num_top, ids in wanted
    ]


def _spread(fields: Mapping[str, Any], name: str, count: int, default: Any) -> list[Any]:
    """The value of field `name` for each of `count` prompts."""
    value = fields.get(name, default)
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} values for {count} prompts", name)
    return value


def _rids(rid: str | list[str] | None, count: int) -> list[Any]:
    """One id for a batch is numbered through."""
    if isinstance(rid, str) and count > 1:
        return [f"{rid}_{index}" for index in range(count)]
    return _spread({"rid": rid}, "rid", count, None)


class Answers:
    """The answer to one call, whole or in chunks, as JSON.

    Args:
        call: what was asked.
        stream: what the engine tells; is closed by the caller.
        incremental: each chunk's text, ids and logprobs are only what is new; the counts stay totals.
        tokenizer: None leaves the text out.
    """

    def __init__(self, call: GenerateCall, stream: Stream, incremental: bool, tokenizer: Tokenizer | None) -> None:
        self._call = call
        self._stream = stream
        incremental = incremental and call.stream
        self._answers = [
            _Answer(entry, index, call, incremental, tokenizer) for index, entry in enumerate(stream.requests)
        ]

    async def whole(self) -> Any:
        """An object, for a batch a list of them in the prompts' order."""
        results: list[Any] = [None] * len(self._answers)
        async for delta in self._stream:  # each request has one, at its end
            results[delta.index] = self._answers[delta.index].add(delta)
        return results if self._call.batched else results[0]

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream, those of a batch as they come."""
        async for delta in self._stream:
            yield self._answers[delta.index].add(delta)


class _Answer:
    """What has been told of one request."""

    def __init__(
        self, entry: InFlight, index: int, call: GenerateCall, incremental: bool, tokenizer: Tokenizer | None
    ) -> None:
        self._rid = entry.rid
        self._prompt_ids = list(entry.prompt_ids) if call.returns_prompt_ids else None
        self._index = index
        self._call = call
        self._incremental = incremental
        self._tokenizer = tokenizer
        self._started = time.monotonic()
        self._text = ""
        self._ids: list[int] = []
        options = call.requests[index].logprobs
        self._logprobs: LogprobAnswer | None = None
        if options is not None:
            texts = tokenizer.token_text if tokenizer is not None and call.text_in_logprobs else None
            self._logprobs = LogprobAnswer(options, entry.prompt_ids, texts)

    def add(self, delta: Delta) -> dict[str, Any]:
        """The next chunk, or the answer, as JSON."""
        if self._incremental:
            self._text = ""
            self._ids = []
        self._text += delta.text
        self._ids += delta.token_ids
        meta: dict[str, Any] = {
            "id": self._rid,
            "finish_reason": finish_json(delta.finish),
            "prompt_tokens": delta.num_prompt,
            "weight_version": WEIGHT_VERSION,
            "num_retractions": delta.num_retractions,
            "reasoning_tokens": 0,
            "completion_tokens": delta.num_generated,
            "cached_tokens": delta.num_cached,
        }
        if self._logprobs is not None:
            meta |= self._logprobs.add(delta, fresh=self._incremental)
        if delta.finish is not None:
            meta["e2e_latency"] = time.monotonic() - self._started
        chunk: dict[str, Any] = {} if self._tokenizer is None else {"text": self._text}
        chunk |= {"output_ids": list(self._ids), "meta_info": meta}
        if self._prompt_ids is not None:
            chunk["prompt_token_ids"] = self._prompt_ids
        if self._call.batched and self._call.stream:
            chunk["index"] = self._index
        return chunk


def finish_json(finish: Finish | None) -> dict[str, Any] | None:
    """`meta_info.finish_reason`."""
    if finish is None:
        return None
    if finish.type == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.type == "length":
        return {"type": "length", "length": finish.length}
    return {"type": "abort", "message": finish.message, "status_code": finish.status, "err_type": None}
