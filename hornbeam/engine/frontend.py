"""Joins text and engine: checks, tokenizes and submits requests, and routes the engine's news to their streams.

Lives in the server's event loop and is used from there only. Knows no HTTP; the HTTP apps and `hornbeam.Engine` both
stand on it.
"""

import asyncio
import dataclasses
import functools
import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Protocol

import msgspec

from hornbeam.core.errors import BadRequest, ConfigError, EngineDead, HornbeamError, Overloaded
from hornbeam.core.request import LogprobOptions, Request, RequestOutput
from hornbeam.engine.commands import Commands
from hornbeam.engine.envelope import Abort, AbortAll, Event, Failed, Ready, Reply, Shutdown, StepOutputs, Submit
from hornbeam.engine.stream import GenerationRequest, InFlight, Stream
from hornbeam.engine.transport import EngineHandle
from hornbeam.text.session import TextSession
from hornbeam.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SILENCE_LIMIT = 30.0  # seconds without a word from a busy engine, after which it counts as stuck
LONG_TEXT = 20_000  # characters; longer prompts are tokenized on a thread, so that nobody else waits


class Observer(Protocol):
    """Somebody who keeps account of what passes."""

    def heard(self, entry: InFlight, output: RequestOutput) -> None:
        """News of a request has come, and the request has taken it: `entry.done` may be the work of a stop string."""

    def left(self, entries: Sequence[InFlight]) -> None:
        """The reader of these has gone before their ends."""


class Frontend:
    """The server's side of one engine.

    Args:
        engine: not started yet.
        observer: sees the news of all requests.
    """

    def __init__(self, engine: EngineHandle, observer: Observer | None = None) -> None:
        self.tokenizer: Tokenizer | None = None
        self.commands = Commands(engine.send, self.check_open)
        self._observer = observer
        self._engine = engine
        self._ready: asyncio.Future[Ready] | None = None
        self._end: ConfigError | EngineDead | None = None  # why the engine does not work any more
        self._open = False
        self._closing = False
        self._in_flight: dict[str, InFlight] = {}  # by key
        self._rids: set[str] = set()  # of those in flight
        self._numbers = itertools.count()
        self._last_heard = 0.0

    async def start(self) -> None:
        """Start the engine, without waiting for it."""
        self._ready = asyncio.get_running_loop().create_future()
        await self._engine.start(self._on_event, self._on_end)

    async def open(self, tokenizer: Tokenizer | None) -> Ready:
        """Serve, from when the engine is ready on. `tokenizer`: None takes and gives ids only.

        Raises:
            ConfigError: the engine cannot work as configured.
            EngineDead: it failed otherwise.
        """
        assert self._ready is not None, "start() comes first"
        await asyncio.wait((self._ready,))
        self.tokenizer = tokenizer
        self._open = True
        return self.facts

    async def close(self, *, drain: bool, timeout: float) -> None:
        """End the engine; `drain` lets it finish what it has, for at most `timeout` seconds.

        One that is not ready yet, or has failed, is not waited for.
        """
        self._closing = True
        self._engine.send(Shutdown(drain=drain))
        await self._engine.close(timeout if self._open and self._end is None else 0.0)
        self._on_end("the server is shutting down")

    @property
    def facts(self) -> Ready:
        """What the engine told when it was ready. Raises Overloaded before, EngineDead after its end."""
        self.check_open()
        assert self._ready is not None
        return self._ready.result()

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._in_flight)

    def check_open(self) -> None:
        """Raises Overloaded while the engine starts or ends, EngineDead (or ConfigError) if it has ended."""
        if self._end is not None:
            raise type(self._end)(str(self._end))  # a new one: each raise adds to an exception's traceback
        if self._closing:
            raise Overloaded("the server is shutting down")
        if not self._open:
            raise Overloaded("the server is still starting")

    def check_health(self) -> None:
        """As `check_open`; and raises EngineDead if the engine has work, but has fallen silent."""
        self.check_open()
        if self._in_flight and time.monotonic() - self._last_heard > SILENCE_LIMIT:
            raise EngineDead(f"the engine has been silent for {SILENCE_LIMIT:.0f} s though it has work")

    async def submit(self, requests: Sequence[GenerationRequest]) -> Stream:
        """Send requests to the engine, all or none. Whoever gets the stream must close it.

        Raises:
            BadRequest: one of them can never be served.
            Overloaded, EngineDead: nothing can be served, now or any more.
        """
        facts = self.facts
        prompts = [await self._prompt_ids(request, facts) for request in requests]
        self.check_open()  # again: tokenizing may have taken its time
        rids = [request.rid if request.rid is not None else secrets.token_hex(16) for request in requests]
        self._refuse_duplicates(rids)
        stream = Stream(self._abort)
        submitted = []
        for index, (request, rid, prompt_ids) in enumerate(zip(requests, rids, prompts, strict=True)):
            session = TextSession(self.tokenizer, request.text_options) if self.tokenizer else None
            key = f"{rid}#{next(self._numbers)}"
            submitted.append(self._engine_request(key, prompt_ids, request))
            entry = InFlight(
                key=key, rid=rid, index=index, prompt_ids=prompt_ids, request=request, session=session, stream=stream
            )
            stream.requests.append(entry)
        self._engine.send(Submit(tuple(submitted)))
        if not self._in_flight:
            self._last_heard = time.monotonic()
        for entry in stream.requests:
            self._in_flight[entry.key] = entry
            self._rids.add(entry.rid)
        return stream

    def abort(self, rid: str) -> None:
        """End the request with this very id, for its reader to see; an unknown one is ignored."""
        for entry in self._in_flight.values():
            if entry.rid == rid:
                self._engine.send(Abort(entry.key))

    def abort_all(self) -> None:
        """End every request, for its reader to see."""
        self._engine.send(AbortAll())

    async def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        """See `Tokenizer.encode`; long texts make nobody wait. Raises BadRequest if there is no tokenizer, too."""
        if self.tokenizer is None:
            raise BadRequest("this server has no tokenizer: send token ids instead of text", "text")
        if len(text) < LONG_TEXT:
            return tuple(self.tokenizer.encode(text, add_special_tokens))
        return tuple(await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens))

    # Requests on their way in.

    async def _prompt_ids(self, request: GenerationRequest, facts: Ready) -> tuple[int, ...]:
        if request.text is None:
            assert request.token_ids is not None, "a request has a prompt"
            ids, field = request.token_ids, "input_ids"
        else:
            ids, field = await self.encode(request.text, request.add_special_tokens), "text"
        if not ids:
            raise BadRequest("the prompt is empty", field)
        room = facts.context_len - (request.sampling.max_new_tokens != 0)
        if len(ids) > room:
            raise BadRequest(
                f"the prompt has {len(ids)} tokens; with the context length of {facts.context_len} at most {room} can "
                "be served (--context-length)",
                field,
            )
        if request.priority is not None and not facts.facts.get("enable_priority_scheduling"):
            if facts.facts.get("abort_on_priority_when_disabled"):
                raise Overloaded("priorities do not count on this server (--enable-priority-scheduling)")
            _log_priority_ignored()
        if request.text_options.stops and self.tokenizer is None:
            raise BadRequest("stop strings need a tokenizer, and this server has none; use stop_token_ids", "stop")
        options = request.logprobs or LogprobOptions()
        known_ids([token_id for token_id, _ in request.sampling.logit_bias], "logit_bias", facts.vocab_size)
        known_ids(options.token_ids, "token_ids_logprob", facts.vocab_size)
        if options.start is not None and options.start > len(ids):
            raise BadRequest(f"logprob_start_len must be at most the prompt's {len(ids)} tokens", "logprob_start_len")
        return known_ids(ids, field, facts.vocab_size)

    def _refuse_duplicates(self, rids: Sequence[str]) -> None:
        seen: set[str] = set()
        for rid in rids:
            if rid in seen or rid in self._rids:
                raise BadRequest(f"a request with id {rid!r} is in flight already; ids must be unique", "rid")
            seen.add(rid)

    def _engine_request(self, key: str, prompt_ids: tuple[int, ...], request: GenerationRequest) -> Request:
        sampling = request.sampling
        if self.tokenizer is not None and not sampling.ignore_eos:
            # The tokenizer may know an end (of a chat turn) that the model's config, all the engine sees, does not.
            stop_token_ids = tuple(self.tokenizer.eos_ids.union(sampling.stop_token_ids))
            sampling = dataclasses.replace(sampling, stop_token_ids=stop_token_ids)
        return Request(
            rid=key,
            prompt_ids=prompt_ids,
            sampling=sampling,
            namespace=request.namespace,
            priority=self.facts.facts.get("default_priority_value", 0)
            if request.priority is None
            else request.priority,
            routing_key=request.routing_key,
            streamed=request.stream_interval is not None,
            told_each_step=request.told_each_step,
            logprobs=request.logprobs,
        )

    def _abort(self, entries: Sequence[InFlight]) -> None:
        """Their reader has left."""
        if entries and self._observer is not None:
            self._observer.left(entries)
        for entry in entries:
            self._engine.send(Abort(entry.key))
            self._forget(entry)

    def _forget(self, entry: InFlight) -> None:
        entry.done = True
        self._in_flight.pop(entry.key, None)
        self._rids.discard(entry.rid)

    # News on their way out.

    def _on_event(self, event: Event) -> None:
        self._last_heard = time.monotonic()  # a Pulse is for that alone
        match event:
            case StepOutputs():
                for output in event.outputs:
                    self._route(output)
            case Reply():
                self.commands.answer(event)
            case Ready():
                assert self._ready is not None
                self._ready.set_result(event)
            case Failed():
                self._die(ConfigError(event.message) if event.is_config else EngineDead(event.message))

    def _route(self, output: RequestOutput) -> None:
        entry = self._in_flight.get(output.rid)
        if entry is None:
            return  # its reader has left, or a stop string has ended it
        try:
            keep_tokens = entry.push(output)
        except Exception as error:  # a fault in making text must not take the other requests with it
            logger.exception("request %r failed", entry.rid)
            self._abort([entry])
            entry.fail(HornbeamError(f"internal error: {type(error).__name__}: {error}"))
            return
        if self._observer is not None:
            self._observer.heard(entry, output)
        if keep_tokens is not None:
            self._engine.send(Abort(entry.key, keep_tokens=keep_tokens))
        if entry.done:
            self._forget(entry)

    def _on_end(self, reason: str) -> None:
        if not self._closing:
            logger.error("%s", reason)
        self._die(EngineDead(reason))

    def _die(self, error: ConfigError | EngineDead) -> None:
        """Fail everything, once: the first reason is the true one."""
        if self._end is not None:
            return
        self._end = error
        if self._ready is not None and not self._ready.done():
            self._ready.cancel()
        lost = EngineDead(f"the request was lost: {error}")
        for entry in list(self._in_flight.values()):
            entry.fail(lost)
            self._forget(entry)
        self.commands.fail()


def known_ids(ids: Sequence[int], field: str, vocab_size: int) -> tuple[int, ...]:
    """The same ids; raises BadRequest if one is no integer, or does not exist. In one pass without a call for each:
    prompts are long."""
    if not ids:
        return ()
    try:
        return msgspec.convert(ids, _ids_below(vocab_size))
    except msgspec.ValidationError:
        raise BadRequest(f"{field} must hold token ids, integers of at least 0 and below {vocab_size}", field) from None


@functools.cache
def _ids_below(vocab_size: int) -> type[tuple[int, ...]]:
    known = Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)]
    return tuple[known, ...]


@functools.cache
def _log_priority_ignored() -> None:
    logger.warning("requests bring priorities, which do not count without --enable-priority-scheduling")
