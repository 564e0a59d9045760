"""What a client reads: the deltas of the requests that it submitted together, with text, as the engine's news come.

Stop strings are found here, and this is authoritative: ids, logprobs and counts end with the token that completed one.
Knows no HTTP and no transport.
"""

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from hornbeam.core.errors import BadRequest, HornbeamError, Overloaded
from hornbeam.core.request import Finish, LogprobOptions, RequestOutput, SamplingParams, TokenLogprobs
from hornbeam.text.session import TextOptions, TextSession


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One generation as a client asks for it. Either `text` or `token_ids` is the prompt."""

    text: str | None = None
    token_ids: Sequence[int] | None = None
    add_special_tokens: bool = True  # frame `text` as a bare prompt; a rendered chat is framed already
    sampling: SamplingParams = field(default_factory=SamplingParams)
    text_options: TextOptions = field(default_factory=TextOptions)
    rid: str | None = None  # None: one is made
    namespace: str = ""
    priority: int | None = None  # None: the server's default
    routing_key: str | None = None
    logprobs: LogprobOptions | None = None
    stream_interval: int | None = None  # tokens between two deltas, the first comes at once; None: one, at the end

    @property
    def told_each_step(self) -> bool:
        """Whether ids become text as they come: somebody waits for it, or it may end the request. Else at the end."""
        return self.stream_interval is not None or self.text_options.stops


def siblings(request: GenerationRequest, num: int) -> tuple[GenerationRequest, ...]:
    """`num` generations for one prompt, which differ in their seeds; the prefix cache lets them share the prompt.

    With a seed of its own a sibling repeats what a request with that seed alone would give: the i-th one's is
    `seed + i`. An id is numbered through.
    """
    if num == 1:
        return (request,)
    seed, rid = request.sampling.seed, request.rid
    return tuple(
        dataclasses.replace(
            request,
            rid=None if rid is None else f"{rid}_{index}",
            sampling=dataclasses.replace(request.sampling, seed=None if seed is None else _wrapped(seed + index)),
        )
        for index in range(num)
    )


def _wrapped(seed: int) -> int:
    """As 64 bits hold it."""
    return (seed + 2**63) % 2**64 - 2**63


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What one request generated since its last delta. The last one carries `finish`.

    A Struct, since one is made per token: a frozen dataclass takes several times as long.
    """

    index: int  # of the request among those submitted together
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    input_logprobs: tuple[TokenLogprobs, ...]  # of the prompt: see RequestOutput
    finish: Finish | None
    num_prompt: int
    num_cached: int
    num_generated: int  # in all
    num_retractions: int


class Stream:
    """The deltas of all requests of one submission, in order of time. Iterate it in the loop that submitted.

    A reader that is slower than the engine gets more tokens per delta: what has come until it reads is one.

    Iteration raises BadRequest, Overloaded, EngineDead or HornbeamError if the engine refused or lost a request.

    Args:
        abort: called with those requests that still run when the reader leaves.
    """

    def __init__(self, abort: Callable[[Sequence["InFlight"]], None]) -> None:
        self.requests: list[InFlight] = []
        self._abort = abort
        self._news: deque[InFlight | HornbeamError] = deque()  # those that have a delta
        self._reader: asyncio.Future[None] | None = None  # waits for news
        self._num_read = 0  # requests whose last delta was read

    @property
    def rids(self) -> list[str]:
        """The requests' ids, as their client knows them."""
        return [request.rid for request in self.requests]

    def put(self, news: "InFlight | HornbeamError") -> None:
        """Let the reader know of a request's delta, or of what went wrong."""
        self._news.append(news)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Delta:
        if self._num_read >= len(self.requests):
            raise StopAsyncIteration
        while not self._news:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        news = self._news.popleft()
        if isinstance(news, HornbeamError):
            self.close()
            raise news
        delta = news.take()
        self._num_read += delta.finish is not None
        return delta

    async def last(self) -> list[Delta]:
        """The one delta of each request, in their order, when all were submitted without `stream_interval`."""
        deltas = [delta async for delta in self]
        return sorted(deltas, key=lambda delta: delta.index)

    def close(self) -> None:
        """The reader leaves: abort what still runs. Does nothing the second time, or when all is finished."""
        running = [request for request in self.requests if not request.done]
        self.requests.clear()  # they know this stream; without a cycle it is gone when it is done, not when garbage is
        self._news.clear()
        self._abort(running)


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class InFlight:
    """One request, from submission until its end."""

    key: str  # the engine's id for it: never used twice, as news of an aborted request may come late
    rid: str
    index: int  # among those submitted together
    prompt_ids: tuple[int, ...]
    request: GenerationRequest
    session: TextSession | None
    stream: Stream
    arrived: float = field(default_factory=time.monotonic)
    done: bool = False
    _latest: RequestOutput = field(init=False)
    _num_generated: int = 0
    _waits: bool = False  # a delta, to be read; what it will hold:
    _finish: Finish | None = None
    _text: str = ""
    _token_ids: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _input_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def push(self, output: RequestOutput) -> int | None:
        """Take news. If a stop string ends the request while the engine still runs it: the tokens to keep."""
        self._latest = output
        self._num_generated = output.num_generated
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        self._input_logprobs += output.input_logprobs
        finish = output.finish
        if finish is not None and finish.status is not None:
            self.fail(_error(finish))
            return None
        reads_along = self.request.told_each_step
        if reads_along or finish is not None:
            finish = self._feed(output.token_ids if reads_along else tuple(self._token_ids), finish)
        self._finish = finish
        self.done = finish is not None
        if not self._waits and (self.done or self._is_due()):
            self._waits = True
            self.stream.put(self)
        return self._num_generated if self.done and output.finish is None else None

    def take(self) -> Delta:
        """What has come since the last delta."""
        latest = self._latest
        delta = Delta(
            index=self.index,
            text=self._text,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            input_logprobs=tuple(self._input_logprobs),
            finish=self._finish,
            num_prompt=latest.num_prompt,
            num_cached=latest.num_cached,
            num_generated=self._num_generated,
            num_retractions=latest.num_retractions,
        )
        self._waits = False
        self._text = ""
        self._token_ids.clear()
        self._logprobs.clear()
        self._input_logprobs.clear()
        return delta

    def fail(self, error: HornbeamError) -> None:
        """The request is lost."""
        self.done = True
        self.stream.put(error)

    def _feed(self, token_ids: tuple[int, ...], finish: Finish | None) -> Finish | None:
        """Turn ids into text; the end of the request, be it the given one or a stop string."""
        if self.session is None:
            return finish
        by_token = finish is not None and finish.type == "stop"
        delta = self.session.feed(token_ids, finish is not None, ends_with_stop_token=by_token)
        self._text += delta.text
        if delta.stopped is None:
            return finish
        surplus = self._num_generated - delta.stopped.keep_tokens
        if surplus:
            del self._token_ids[-surplus:]
            del self._logprobs[-surplus:]
        self._num_generated = delta.stopped.keep_tokens
        return Finish(type="stop", matched=delta.stopped.matched)

    def _is_due(self) -> bool:
        interval, num_new = self.request.stream_interval, len(self._token_ids)
        return interval is not None and num_new > 0 and (num_new == self._num_generated or num_new >= interval)


def _error(finish: Finish) -> HornbeamError:
    message = finish.message or "the engine ended the request"
    if finish.status == BadRequest.status:
        return BadRequest(message)
    return Overloaded(message) if finish.status == Overloaded.status else HornbeamError(message)
