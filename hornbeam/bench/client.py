"""Sends one request to a server and notes when its tokens come. Knows three APIs; each is a row of `BACKENDS`."""

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hornbeam.bench.datasets import Sample
from hornbeam.core.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one request. Times are of time.perf_counter()."""

    num_input: int
    num_output: int = 0
    started: float = 0.0
    finished: float = 0.0
    first_token: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between tokens; those that come together share a gap
    text: str = ""
    error: str = ""

    def note(self, now: float, last: float, num_new: int) -> None:
        """`num_new` tokens came `now`, the ones before at `last`."""
        if not self.first_token:
            self.first_token = now
            num_new, last = num_new - 1, now
        self.gaps += [(now - last) / num_new] * num_new if num_new > 0 else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is the same for all requests."""

    backend: str
    base_url: str
    model: str
    stream: bool
    ignore_eos: bool
    send_ids: bool
    return_logprob: bool
    extra: Mapping[str, Any]  # merged into each body


@dataclass(frozen=True, slots=True)
class _Backend:
    path: str
    body: Callable[[Sample, Call], dict[str, Any]]
    read: Callable[[Mapping[str, Any], Record], int]  # event, record -> tokens so far


def _native_body(sample: Sample, call: Call) -> dict[str, Any]:
    sampling = {"temperature": 0.0, "max_new_tokens": sample.num_output, "ignore_eos": call.ignore_eos}
    prompt: dict[str, Any] = {"input_ids": sample.token_ids} if call.send_ids else {"text": sample.text}
    logprobs = {"return_logprob": True} if call.return_logprob else {}
    return {**prompt, "sampling_params": sampling, "stream": call.stream, **logprobs}


def _read_native(event: Mapping[str, Any], record: Record) -> int:
    facts = event["meta_info"]
    record.text = event.get("text") or ""
    record.num_input = facts.get("prompt_tokens", record.num_input)
    return int(facts["completion_tokens"])


def _openai_body(sample: Sample, call: Call) -> dict[str, Any]:
    options = {"stream_options": {"include_usage": True}} if call.stream else {}
    body = {"model": call.model, "temperature": 0.0, "max_tokens": sample.num_output, "stream": call.stream, **options}
    return body | ({"ignore_eos": True} if call.ignore_eos else {})


def _completion_body(sample: Sample, call: Call) -> dict[str, Any]:
    prompt = sample.token_ids if call.send_ids else sample.text
    logprobs = {"logprobs": 1} if call.return_logprob else {}
    return {**_openai_body(sample, call), "prompt": prompt, **logprobs}


def _chat_body(sample: Sample, call: Call) -> dict[str, Any]:
    messages = sample.messages or ({"role": "user", "content": sample.text},)
    logprobs = {"logprobs": True} if call.return_logprob else {}
    return {**_openai_body(sample, call), "messages": messages, **logprobs}


def _read_openai(event: Mapping[str, Any], record: Record) -> int:
    usage = event.get("usage") or {}
    record.num_input = usage.get("prompt_tokens", record.num_input)
    new = ""
    for choice in event.get("choices") or ():
        message = choice.get("delta") or choice.get("message") or choice
        new += message.get("content") or message.get("text") or message.get("reasoning_content") or ""
    record.text += new
    if usage.get("completion_tokens"):
        return int(usage["completion_tokens"])
    return record.num_output + bool(new)  # until usage is told, an event counts as one token


_NATIVE = _Backend("/generate", _native_body, _read_native)
_COMPLETIONS = _Backend("/v1/completions", _completion_body, _read_openai)
_CHAT = _Backend("/v1/chat/completions", _chat_body, _read_openai)
BACKENDS: dict[str, _Backend] = {
    "hornbeam": _NATIVE,
    "sglang": _NATIVE,
    "sglang-native": _NATIVE,
    "openai": _COMPLETIONS,
    "sglang-oai": _COMPLETIONS,
    "vllm": _COMPLETIONS,
    "openai-chat": _CHAT,
    "sglang-oai-chat": _CHAT,
    "vllm-chat": _CHAT,
}


def open_session(headers: Mapping[str, str]) -> "aiohttp.ClientSession":
    """For any number of connections at once. Raises ConfigError if aiohttp is not installed."""
    try:
        import aiohttp
    except ImportError as error:
        raise ConfigError(f"load generators need aiohttp ({error}): pip install 'hornbeam[bench]'") from error
    timeout = aiohttp.ClientTimeout(total=6 * 3600)
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector, read_bufsize=2**20)


async def send(session: "aiohttp.ClientSession", call: Call, sample: Sample) -> Record:
    """Send one request and read its answer; what goes wrong is in the record."""
    backend = BACKENDS[call.backend]
    record = Record(num_input=len(sample.token_ids))
    body = {**backend.body(sample, call), **call.extra}
    record.started = last = time.perf_counter()
    try:
        async with session.post(call.base_url + backend.path, json=body) as response:
            if response.status != 200:
                record.error = f"{response.status}: {(await response.text())[:500]}"
                return record
            async for event in events(response) if call.stream else _whole(response):
                now = time.perf_counter()
                if event.get("error"):
                    record.error = json.dumps(event["error"])
                    return record
                num_output = backend.read(event, record)
                if call.stream and num_output > record.num_output and not _only_tells_usage(event):
                    record.note(now, last, num_output - record.num_output)
                    last = now
                record.num_output = num_output
    except Exception as error:  # connection trouble of any kind is a failed request, not the end of the run
        record.error = f"{type(error).__name__}: {error}"
    record.finished = time.perf_counter()
    return record


def _only_tells_usage(event: Mapping[str, Any]) -> bool:
    return event.get("choices") == []


async def events(response: "aiohttp.ClientResponse") -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]."""
    async for line in response.content:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


async def _whole(response: "aiohttp.ClientResponse") -> AsyncIterator[dict[str, Any]]:
    yield await response.json()
