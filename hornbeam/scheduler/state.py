"""What the scheduler knows of one request, and of one step that is on its way. No decisions."""

from dataclasses import dataclass, field
from typing import Any

from hornbeam.cache.node import Node
from hornbeam.core.plan import Chunk, PageGrant, SlotStart
from hornbeam.core.request import Finish, Request, RequestOutput, Status, TokenLogprobs


@dataclass(slots=True, eq=False)
class RequestState:
    """The truth about one request. Lengths count tokens from the start of the prompt."""

    request: Request
    seed: int
    arrival: int  # rank among all requests ever submitted
    max_tokens: int  # prompt and generated tokens, at most
    stop_ids: frozenset[int]
    num_prompt: int = field(init=False)
    tokens: list[int] = field(init=False)  # prompt, then what was generated and has come back
    last_kv_len: int = field(init=False)  # rows that are written when it has ended by length
    status: Status = Status.WAITING
    aged: bool = False  # has been overtaken so often that it comes before all others
    since: float | None = None  # when it was first seen in this status, in seconds
    prefill_end: int = 0  # tokens before it come in chunks, later ones by decode
    kv_len: int = 0  # rows written or promised by planned steps
    last_step: int = -1  # the last planned step that contains it
    score_from: int = field(init=False)  # the rows of the prompt from here on have yet to score their next token
    # Owned memory; see `Memory`.
    slot: int = -1
    pages: list[list[int]] = field(default_factory=list)  # [group][page]; those before `node.length` are the tree's
    capacity: int = 0  # tokens that `pages` can hold
    num_granted: int = 0  # pages per group that the device's page table holds
    node: Node | None = None  # locked
    floors: list[int] = field(default_factory=list)  # [group]: the first page that is kept; above 0 in windows only
    held_from: dict[int, int] = field(default_factory=dict)  # windowed group: the first token held in the tree
    # What the client is told.
    num_cached: int = 0
    num_retractions: int = 0
    num_reported: int = 0  # generated tokens in outputs so far
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # not yet reported
    input_logprobs: list[TokenLogprobs] = field(default_factory=list)  # not yet reported
    num_scored: int = 0  # tokens of the prompt whose logprobs have come back
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.last_kv_len = max(self.num_prompt, self.max_tokens - 1)  # the last token's own row is never needed
        self.rescore()

    @property
    def reuse_end(self) -> int:
        """Rows before it may come from the cache; those after are computed, as their logits are wanted."""
        end = len(self.tokens) - 1
        return min(end, self.score_from) if self.score_from < self.num_prompt - 1 else end

    def rescore(self) -> None:
        """Scoring goes on from what has come back: rows that were planned before are gone."""
        options = self.request.logprobs
        start = None if options is None else options.start
        self.score_from = self.num_prompt if start is None else start + self.num_scored

    def slot_start(self, num_cached: int) -> SlotStart:
        """What the device must know of it, when it takes its slot."""
        sampling, num_prompt = self.request.sampling, self.num_prompt
        bans: dict[str, Any] = {
            "banned_ids": tuple(self.stop_ids),
            "banned_until": num_prompt + sampling.min_new_tokens,
        }
        history: dict[str, Any] = {
            "prompt_ids": self.request.prompt_ids,
            "generated_ids": tuple(self.tokens[num_prompt:]),
        }
        return SlotStart(
            slot=self.slot,
            num_cached=num_cached,
            sampling=sampling,
            seed=self.seed,
            logprobs=self.request.logprobs,
            **(bans if sampling.min_new_tokens else {}),
            **(history if sampling.penalizes else {}),
        )

    def chunk(self, start: int, end: int, *, samples: bool) -> Chunk:
        """Its rows from `start` to `end`; those that have yet to score the prompt's next token do."""
        first, stop = max(start, self.score_from), min(end, self.num_prompt - 1)
        scores = first < stop
        if scores:
            self.score_from = stop
        return Chunk(
            slot=self.slot,
            start=start,
            token_ids=tuple(self.tokens[start:end]),
            samples=samples,
            scored_ids=tuple(self.tokens[first + 1 : stop + 1]) if scores else (),
            first_scored=first + 1 if scores else 0,
        )

    def accept(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> Finish | None:
        """Append sampled ids up to the one that ends the request, and say why it ended, if it did."""
        for index, token_id in enumerate(token_ids):
            self.tokens.append(token_id)
            self.logprobs += logprobs[index : index + 1]
            if token_id in self.stop_ids:
                return Finish(type="stop", matched=token_id)
            if len(self.tokens) == self.max_tokens:
                return Finish(type="length", length=self.max_tokens - self.num_prompt)
        return None

    def accept_scores(self, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Append logprobs of the prompt."""
        self.input_logprobs += logprobs
        self.num_scored += len(logprobs)

    def output(self) -> RequestOutput:
        """The news since the last call."""
        num_generated = len(self.tokens) - self.num_prompt
        token_ids = tuple(self.tokens[self.num_prompt + self.num_reported :])
        self.num_reported = num_generated
        logprobs, input_logprobs = tuple(self.logprobs), tuple(self.input_logprobs)
        self.logprobs.clear()
        self.input_logprobs.clear()
        return RequestOutput(
            rid=self.request.rid,
            token_ids=token_ids,
            logprobs=logprobs,
            input_logprobs=input_logprobs,
            finish=self.finish,
            num_prompt=self.num_prompt,
            num_cached=self.num_cached,
            num_generated=num_generated,
            num_retractions=self.num_retractions,
        )


@dataclass(slots=True)
class Step:
    """A step being planned, then in flight: the parts of its plan, and whom its result concerns."""

    step_id: int
    starts: list[SlotStart] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    decode: list[int] = field(default_factory=list)
    decode_lens: list[int] = field(default_factory=list)
    rows: list[RequestState] = field(default_factory=list)  # the sampling rows, in the plan's order
    silent: dict[RequestState, int] = field(default_factory=dict)  # chunks that do not sample: length after the step
    scoring: list[RequestState] = field(default_factory=list)  # whose chunks have `scored_ids`, in their order
    published: list[Node] = field(default_factory=list)  # tree nodes whose rows it completes
    starved: bool = False  # a decode row had to wait for a page

    @property
    def num_prompt_tokens(self) -> int:
        """Of all chunks."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def empty(self) -> bool:
        """Nothing is to run."""
        return not (self.rows or self.silent)
