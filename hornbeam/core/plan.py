"""One step as a value: `StepPlan` goes from the scheduler to the executor, `StepResult` comes back.

Both are frozen, printable and made of plain numbers, so a step can be logged, replayed, compared and sent to
other ranks. A plan carries deltas: the device owns lengths, last ids and page tables per slot.

Row order of a step: the decode rows, in the order of `decode`, then the chunks, in their order. A row that
samples yields one entry of `StepResult.token_ids`: every decode row does, a chunk when `samples` is set.
"""

from dataclasses import dataclass

from hornbeam.core.request import LogprobOptions, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStart:
    """A request takes `slot`; the first `num_cached` tokens of its page table hold valid keys and values."""

    slot: int
    num_cached: int
    sampling: SamplingParams
    seed: int  # the request's own, or drawn by the scheduler: never None
    banned_ids: tuple[int, ...] = ()  # not to be chosen for positions below `banned_until`
    banned_until: int = 0
    prompt_ids: tuple[int, ...] = ()  # for penalties, and only with them; nor would the tokens in the cache be known
    generated_ids: tuple[int, ...] = ()  # likewise: before the request was retracted
    logprobs: LogprobOptions | None = None
    adapter_slot: int = 0  # 0: no adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGrant:
    """Write `page_ids` into the page table of `slot` for cache group `group`, from entry `first` on."""

    slot: int
    group: int
    first: int
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMove:
    """Copy page `source` to `target` inside cache group `group` before the step runs (tiers, defragmentation)."""

    group: int
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A stretch of a prompt: the ids at positions `start .. start + len(token_ids)` of `slot`."""

    slot: int
    start: int
    token_ids: tuple[int, ...]
    samples: bool  # the prompt ends here: sample the first new token
    scored_ids: tuple[int, ...] = ()  # the prompt's tokens whose logprobs are wanted, given those before them
    first_scored: int = 0  # position of the first one; its logits come from the row before it, which is in the chunk
    embed_spans: tuple[tuple[int, int], ...] = ()  # position ranges whose embeddings are given, not looked up

    @property
    def end(self) -> int:
        """The slot's length after the step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTree:
    """Draft tokens of one decode row; `parents[i]` is the index of token i's parent, -1 for the root."""

    slot: int
    token_ids: tuple[int, ...]
    parents: tuple[int, ...] = ()  # empty: a chain


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """Decode rows whose first `num_tokens` tokens, whole pages, have the same pages in every full cache group."""

    rows: tuple[int, ...]  # ascending indices into `StepPlan.decode`, at least two
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What the executor runs next. Applied in field order: starts, grants, moves, then the forward."""

    step_id: int
    starts: tuple[SlotStart, ...] = ()
    grants: tuple[PageGrant, ...] = ()
    page_moves: tuple[PageMove, ...] = ()
    decode: tuple[int, ...] = ()  # slots that continue from their last id
    decode_lens: tuple[int, ...] = ()  # upper bound of each one's length after the step
    shared: tuple[SharedPrefix, ...] = ()  # each decode row is in one of them at most
    chunks: tuple[Chunk, ...] = ()
    drafts: tuple[DraftTree, ...] = ()
    collect: tuple[str, ...] = ()  # what to return besides ids: "hidden", "routed_experts"
    padded_tokens: int = 0  # agreed among data-parallel ranks; 0: the executor's choice
    idle: bool = False  # a step only to keep collectives in step with other ranks
    weight_version: int = 0

    @property
    def sampling_slots(self) -> tuple[int, ...]:
        """Of the rows that sample, in the order of the result's `token_ids`."""
        return self.decode + tuple(chunk.slot for chunk in self.chunks if chunk.samples)

    @property
    def num_samples(self) -> int:
        """Rows that sample, and so the length of the result's `token_ids`."""
        return len(self.decode) + sum(chunk.samples for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass, without padding."""
        return len(self.decode) + sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step produced: for each sampling row, the 0..k ids it accepted."""

    step_id: int
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()  # like token_ids, () for rows that want none; () if none does
    input_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()  # for each chunk with `scored_ids`, of those
    error: str | None = None  # the step failed: nothing it wrote is valid
