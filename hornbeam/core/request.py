"""A request as the engine sees it: token ids in, limits and sampling numbers; no text, no strings to match.

Text, stop strings and streaming belong to the `text` session in the server process.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from hornbeam.core.errors import BadRequest

GREEDY_TEMPERATURE = 1e-6  # below this, sampling is argmax


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when generation ends. Checked on construction.

    Raises:
        BadRequest: a value is out of its range; the error names the field.
    """

    max_new_tokens: int | None = 128  # None: until the context ends; 0: prefill only
    min_new_tokens: int = 0  # before so many, no token that would end the request is chosen
    temperature: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability
    frequency_penalty: float = 0.0  # for each time that a token was generated
    presence_penalty: float = 0.0  # once it was generated
    repetition_penalty: float = 1.0  # once it stands in the prompt or was generated
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    seed: int | None = None  # None: the engine draws one
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        most = math.inf if self.max_new_tokens is None else self.max_new_tokens
        _require(most >= 0, "max_new_tokens", "must be at least 0")
        _require(0 <= self.min_new_tokens <= most, "min_new_tokens", "must be at least 0 and at most max_new_tokens")
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "must be finite and >= 0")
        _require(self.top_k == -1 or self.top_k >= 1, "top_k", "must be -1 (off) or at least 1")
        _require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", "must be in [0, 1]")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "must be in [-2, 2]")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", "must be in [-2, 2]")
        _require(0 < self.repetition_penalty <= 2, "repetition_penalty", "must be in (0, 2]")
        _require(all(math.isfinite(bias) for _, bias in self.logit_bias), "logit_bias", "must hold finite numbers")
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit in 64 bits")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def filters(self) -> bool:
        """Whether unlikely tokens are excluded."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether what was generated, or stands in the prompt, makes tokens more or less likely."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


def _require(condition: bool, field: str, what: str) -> None:
    if not condition:
        raise BadRequest(f"{field} {what}", field)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobOptions:
    """Which log-probabilities a request wants to know: of each generated token, and besides.

    Raises:
        BadRequest: a value is out of its range; the error names the field.
    """

    num_top: int = 0  # and of so many of the likeliest tokens
    token_ids: tuple[int, ...] = ()  # and of these
    start: int | None = None  # and of the prompt's tokens behind this position; None: of none of them

    def __post_init__(self) -> None:
        _require(self.num_top >= 0, "top_logprobs_num", "must be at least 0")
        _require(self.start is None or self.start >= 0, "logprob_start_len", "must be at least 0, or -1 (none)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the raw distribution."""

    chosen: float  # of the token that stands there
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first
    asked: tuple[float, ...] = ()  # of `LogprobOptions.token_ids`, in their order


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation to run. `rid` is unique among the requests in flight. Its token ids exist: whoever makes it has
    looked, and nobody behind does."""

    rid: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    namespace: str = ""  # prefixes are shared only inside one: adapter, cache salt, weight version
    adapter: str | None = None
    logprobs: LogprobOptions | None = None
    priority: int = 0
    routing_key: str | None = None  # requests with the same one do well to run together
    streamed: bool = False  # somebody reads token by token
    told_each_step: bool = True  # its news are wanted after each step; else with its first token and at its end


class Status(Enum):
    """Where a request stands. The two remote states are entered by grammars and by disaggregation."""

    WAITING = "waiting"
    WAITING_GRAMMAR = "waiting_grammar"
    WAITING_REMOTE_KV = "waiting_remote_kv"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Why a request ended. `type` is "stop", "length" or "abort", as in the API."""

    type: str
    matched: int | str | None = None  # stop: the token id, or the string that the text session found
    length: int | None = None  # length: tokens generated
    message: str | None = None  # abort
    status: int | None = None  # abort caused by the engine: the HTTP status to answer with


class RequestOutput(NamedTuple):
    """News of one request after a step: what it generated since the last news, and whether it ended.

    Exactly one output per request carries `finish`. A tuple, since one is made, sent and read per token: that takes a
    frozen dataclass three times as long.
    """

    rid: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id, if the request asked for them
    input_logprobs: tuple[TokenLogprobs, ...] = ()  # of prompt tokens, from position `LogprobOptions.start` + 1 on
    finish: Finish | None = None
    num_prompt: int = 0
    num_cached: int = 0  # prompt tokens whose keys and values were reused
    num_generated: int = 0  # in all, this news included
    num_retractions: int = 0
