"""From logits to ids: temperature, top-k, top-p, Gumbel noise, logprobs. Owns the sampling tensors, by slot."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hornbeam.core.plan import SlotStart
from hornbeam.core.request import TokenLogprobs
from hornbeam.ops.sample.contract import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """R rows on the device: ids [R], and with logprobs the chosen ones [R] and the likeliest n [R, n]."""

    ids: Tensor
    chosen: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def download(self) -> "Sampled":
        """The same on the CPU, without waiting: valid once the device has done what was enqueued so far."""
        return Sampled(
            ids=self.ids.to("cpu", non_blocking=True),
            chosen=None if self.chosen is None else self.chosen.to("cpu", non_blocking=True),
            top_ids=None if self.top_ids is None else self.top_ids.to("cpu", non_blocking=True),
            top_logprobs=None if self.top_logprobs is None else self.top_logprobs.to("cpu", non_blocking=True),
        )


class Sampler:
    """One row of parameters per slot; the last slot belongs to padding rows and is greedy."""

    def __init__(self, num_slots: int, op: Sample, device: torch.device) -> None:
        self._op = op
        self._temperatures = torch.zeros(num_slots + 1, device=device)
        self._top_ks = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._top_ps = torch.ones(num_slots + 1, device=device)
        self._seeds = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._filtered: set[int] = set()  # slots that use top-k or top-p

    def note(self, start: SlotStart) -> tuple[int, float, int, float]:
        """Remember on the host what `start` needs; the numbers to upload: seed, temperature, top_k, top_p."""
        params = start.sampling
        filtered = not params.greedy and (params.top_k > 0 or params.top_p < 1)
        (self._filtered.add if filtered else self._filtered.discard)(start.slot)
        return start.seed, 0.0 if params.greedy else params.temperature, max(params.top_k, 0), params.top_p

    def start(self, slots: Tensor, seeds: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor) -> None:
        """Set the parameters of `slots` [N], all on the device."""
        self._seeds[slots] = seeds
        self._temperatures[slots] = temperatures
        self._top_ks[slots] = top_ks
        self._top_ps[slots] = top_ps

    def sample(
        self, logits: Tensor, slots: Tensor, positions: Tensor, host_slots: tuple[int, ...], top_logprobs: int
    ) -> Sampled:
        """Choose an id per row.

        logits: [R, V]; slots: [R] int64, whose host copy begins with `host_slots` (padding rows may follow);
        positions: [R] int64 of the ids to choose; top_logprobs: as in StepPlan.
        """
        temperatures = self._temperatures[slots]
        scores = logits
        if not self._filtered.isdisjoint(host_slots):
            scores = keep_top(logits.float(), temperatures, self._top_ks[slots], self._top_ps[slots])
        ids = self._op.sample(scores, temperatures, self._seeds[slots], positions)
        if top_logprobs < 0:
            return Sampled(ids=ids)
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
        top, top_ids = logprobs.topk(min(top_logprobs, logprobs.shape[1]), -1)
        return Sampled(ids=ids, chosen=chosen, top_ids=top_ids, top_logprobs=top)


def keep_top(logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """Set to -inf what top-k, and then top-p among the rest, exclude.

    logits: [R, V] float32; temperatures: [R], 0 for greedy rows, which stay as they are; top_ks: [R] int64, 0 for all;
    top_ps: [R]. Top-p keeps the likeliest tokens whose mass before them is below p (Holtzman et al., 2020).
    """
    vocab_size = logits.shape[1]
    order_logits, order = logits.sort(stable=True, dim=-1, descending=True)
    ranks = torch.arange(vocab_size, device=logits.device)
    keep = (ranks < top_ks.unsqueeze(1)) | (top_ks == 0).unsqueeze(1)
    scale = torch.where(temperatures > 0, temperatures, 1.0).unsqueeze(1)
    probs = (order_logits / scale).masked_fill(~keep, -torch.inf).softmax(-1)
    keep &= (probs.cumsum(-1) - probs) < top_ps.unsqueeze(1)
    keep |= (ranks == 0) | (temperatures == 0).unsqueeze(1)
    excluded = torch.empty_like(keep).scatter_(1, order, ~keep)
    return logits.masked_fill(excluded, -torch.inf)


def read_logprobs(sampled: Sampled, num_rows: int) -> tuple[tuple[TokenLogprobs, ...], ...]:
    """The first `num_rows` rows of a sample on the CPU, one position each; empty if there are no logprobs."""
    if sampled.chosen is None or sampled.top_ids is None or sampled.top_logprobs is None:
        return ()
    chosen, ids, top = sampled.chosen.tolist(), sampled.top_ids.tolist(), sampled.top_logprobs.tolist()
    return tuple(
        (TokenLogprobs(chosen=chosen[row], top=tuple(zip(ids[row], top[row], strict=True))),) for row in range(num_rows)
    )
