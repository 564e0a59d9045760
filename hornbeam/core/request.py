"""A request as the engine sees it: token ids in, limits and sampling numbers; no text, no strings to match.

Text, stop strings and streaming belong to the `text` session in the server process.
"""

import math
from dataclasses import dataclass
from enum import Enum

from hornbeam.core.errors import BadRequest

GREEDY_TEMPERATURE = 1e-6  # below this, sampling is argmax


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when generation ends. Checked on construction.

    Raises:
        BadRequest: a value is out of its range; the error names the field.
    """

    max_new_tokens: int | None = 128  # None: until the context ends; 0: prefill only
    temperature: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    top_p: float = 1.0
    seed: int | None = None  # None: the engine draws one
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(self.max_new_tokens is None or self.max_new_tokens >= 0, "max_new_tokens", "must be at least 0")
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "must be finite and >= 0")
        _require(self.top_k == -1 or self.top_k >= 1, "top_k", "must be -1 (off) or at least 1")
        _require(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "sampling_seed", "must fit in 64 bits")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1


def _require(condition: bool, field: str, what: str) -> None:
    if not condition:
        raise BadRequest(f"{field} {what}", field)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural-log probabilities at one generated position, of the raw distribution."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation to run. `rid` is unique among the requests in flight."""

    rid: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    namespace: str = ""  # prefixes are shared only inside one: adapter, cache salt, weight version
    adapter: str | None = None
    return_logprob: bool = False
    top_logprobs: int = 0  # alternatives per generated token; needs return_logprob
    priority: int = 0
    routing_key: str | None = None  # requests with the same one do well to run together


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """News of one request after a step: what it generated since the last news, and whether it ended.

    Exactly one output per request carries `finish`.
    """

    rid: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id, if the request asked for them
    finish: Finish | None = None
    num_prompt: int = 0
    num_cached: int = 0  # prompt tokens whose keys and values were reused
    num_generated: int = 0  # in all, this news included
    num_retractions: int = 0
