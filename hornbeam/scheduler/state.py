"""What the scheduler knows of one request, and of one step that is on its way; its numbers for others. No decisions."""

from dataclasses import dataclass, field

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
    num_top: int = field(init=False)  # what it asks of a plan's `top_logprobs`
    num_prompt: int = field(init=False)
    tokens: list[int] = field(init=False)  # prompt, then what was generated and has come back
    last_kv_len: int = field(init=False)  # rows that are written when it has ended by length
    status: Status = Status.WAITING
    aged: bool = False  # has been overtaken so often that it comes before all others
    since: float | None = None  # when it was first seen in this status, in seconds
    prefill_end: int = 0  # tokens before it come in chunks, later ones by decode
    kv_len: int = 0  # rows written or promised by planned steps
    last_step: int = -1  # the last planned step that contains it
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
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.last_kv_len = max(self.num_prompt, self.max_tokens - 1)  # the last token's own row is never needed
        self.num_top = self.request.top_logprobs if self.request.return_logprob else -1

    def accept(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> Finish | None:
        """Append sampled ids up to the one that ends the request, and say why it ended, if it did."""
        for index, token_id in enumerate(token_ids):
            self.tokens.append(token_id)
            if self.num_top >= 0:
                entry = logprobs[index]
                self.logprobs.append(TokenLogprobs(chosen=entry.chosen, top=entry.top[: self.num_top]))
            if token_id in self.stop_ids:
                return Finish(type="stop", matched=token_id)
            if len(self.tokens) == self.max_tokens:
                return Finish(type="length", length=self.max_tokens - self.num_prompt)
        return None

    def output(self) -> RequestOutput:
        """The news since the last call."""
        num_generated = len(self.tokens) - self.num_prompt
        token_ids = tuple(self.tokens[self.num_prompt + self.num_reported :])
        self.num_reported = num_generated
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self.logprobs:
            logprobs = tuple(self.logprobs)
            self.logprobs.clear()
        return RequestOutput(
            rid=self.request.rid,
            token_ids=token_ids,
            logprobs=logprobs,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Numbers for logs and metrics. The totals count since the start, prompts when their request ends."""

    num_running: int
    num_waiting: int
    num_used_tokens: int  # held by requests, in whole pages
    num_cached_tokens: int  # kept for reuse only
    max_total_tokens: int
    total_prompt_tokens: int
    total_cached_tokens: int  # of the prompt tokens
    total_generated_tokens: int
    total_retractions: int
