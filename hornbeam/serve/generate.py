"""The language of /generate, which `hornbeam.Engine` speaks too: from JSON to requests, from deltas to JSON.

Knows no HTTP.
"""

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from hornbeam.core.errors import BadRequest
from hornbeam.core.request import Finish, SamplingParams
from hornbeam.engine.stream import Delta, GenerationRequest, Stream
from hornbeam.serve.fields import GENERATE, SAMPLING, as_strings
from hornbeam.text.session import TextOptions
from hornbeam.text.tokenizer import Tokenizer

WEIGHT_VERSION = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A parsed body. `batched`: the answer is a list, though it may have one element."""

    requests: tuple[GenerationRequest, ...]
    batched: bool
    stream: bool
    text_in_logprobs: bool


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
        prompts = [{"token_ids": tuple(row)} for row in (ids if batched else [ids])]
    if not prompts:
        raise BadRequest("text must not be an empty list", "text")
    stream, count = fields.get("stream", False), len(prompts)
    shared = zip(
        _samplings(fields, count, default_interval if stream else None),
        _rids(fields.get("rid"), count),
        _spread(fields, "return_logprob", count, False),
        _spread(fields, "top_logprobs_num", count, 0),
        _spread(fields, "extra_key", count, ""),
        _spread(fields, "priority", count, None),
        _spread(fields, "routing_key", count, None),
        strict=True,
    )
    return GenerateCall(
        requests=tuple(
            GenerationRequest(
                **prompt,
                **sampling,
                rid=rid,
                return_logprob=return_logprob,
                top_logprobs=num_top if return_logprob else 0,
                namespace=namespace,
                priority=priority,
                routing_key=routing_key,
            )
            for prompt, (sampling, rid, return_logprob, num_top, namespace, priority, routing_key) in zip(
                prompts, shared, strict=True
            )
        ),
        batched=batched,
        stream=stream,
        text_in_logprobs=fields.get("return_text_in_logprobs", False),
    )


def parse_sampling(params: Any, interval: int | None) -> dict[str, Any]:
    """`sampling_params` as the fields of a GenerationRequest.

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
    return {
        "sampling": SamplingParams(
            max_new_tokens=None if until_end else fields.get("max_new_tokens", 128),
            temperature=fields.get("temperature", 1.0),
            top_k=fields.get("top_k", -1),
            top_p=fields.get("top_p", 1.0),
            seed=fields.get("sampling_seed"),
            stop_token_ids=tuple(fields.get("stop_token_ids", ())),
            ignore_eos=fields.get("ignore_eos", False),
        ),
        "text_options": TextOptions(
            stop=as_strings(fields.get("stop", ())),
            skip_special_tokens=fields.get("skip_special_tokens", True),
            spaces_between_special_tokens=fields.get("spaces_between_special_tokens", True),
            no_stop_trim=fields.get("no_stop_trim", False),
        ),
        "stream_interval": None if interval is None else fields.get("stream_interval", interval),
    }


def _samplings(fields: Mapping[str, Any], count: int, interval: int | None) -> list[dict[str, Any]]:
    given = fields.get("sampling_params", {})
    if isinstance(given, list):
        return [parse_sampling(params, interval) for params in _spread(fields, "sampling_params", count, {})]
    return [parse_sampling(given, interval)] * count


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
        self._answers = [_Answer(rid, index, call, incremental, tokenizer) for index, rid in enumerate(stream.rids)]

    async def whole(self) -> Any:
        """An object, for a batch a list of them in the prompts' order."""
        results = [self._answers[delta.index].add(delta) for delta in await self._stream.last()]
        return results if self._call.batched else results[0]

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream, those of a batch as they come."""
        async for delta in self._stream:
            yield self._answers[delta.index].add(delta)


class _Answer:
    """What has been told of one request."""

    def __init__(
        self, rid: str, index: int, call: GenerateCall, incremental: bool, tokenizer: Tokenizer | None
    ) -> None:
        self._rid = rid
        self._index = index
        self._call = call
        self._request = call.requests[index]
        self._incremental = incremental
        self._tokenizer = tokenizer
        self._started = time.monotonic()
        self._num_logprobs = 0
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[Any] = []
        self._tops: list[Any] = []

    def add(self, delta: Delta) -> dict[str, Any]:
        """The next chunk, or the answer, as JSON."""
        if self._incremental:
            self._text = ""
            self._ids, self._logprobs, self._tops = [], [], []
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
        if self._request.return_logprob:
            meta |= self._add_logprobs(delta)
        if delta.finish is not None:
            meta["e2e_latency"] = time.monotonic() - self._started
        chunk: dict[str, Any] = {} if self._tokenizer is None else {"text": self._text}
        chunk |= {"output_ids": list(self._ids), "meta_info": meta}
        if self._call.batched and self._call.stream:
            chunk["index"] = self._index
        return chunk

    def _add_logprobs(self, delta: Delta) -> dict[str, Any]:
        self._num_logprobs += len(delta.logprobs)
        for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True):
            self._logprobs.append(self._triple(entry.chosen, token_id))
            self._tops.append([self._triple(logprob, top_id) for top_id, logprob in entry.top])
        meta: dict[str, Any] = {
            "input_token_logprobs": [],
            "output_token_logprobs": list(self._logprobs),
            "output_token_logprobs_length": self._num_logprobs,
        }
        if self._request.top_logprobs:
            meta |= {"input_top_logprobs": [], "output_top_logprobs": list(self._tops)}
        return meta

    def _triple(self, logprob: float, token_id: int) -> list[Any]:
        text = self._tokenizer.token_text(token_id) if self._tokenizer and self._call.text_in_logprobs else None
        return [logprob, token_id, text]


def finish_json(finish: Finish | None) -> dict[str, Any] | None:
    """`meta_info.finish_reason`."""
    if finish is None:
        return None
    if finish.type == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.type == "length":
        return {"type": "length", "length": finish.length}
    return {"type": "abort", "message": finish.message, "status_code": finish.status, "err_type": None}
