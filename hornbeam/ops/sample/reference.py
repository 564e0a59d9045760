"""Penalties, thresholds and Gumbel-max sampling in plain torch."""

import torch
from torch import Tensor

from hornbeam.ops.query import OpQuery
from hornbeam.ops.sample.contract import GENERATED, Limits

_NUM_CANDIDATES = 1024
_WORD = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _WORD
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _WORD
    return h ^ (h >> 16)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """[R, V] float32 noise of the contract, for seeds and positions [R] int64."""
    key = _mix((_mix(seeds & _WORD) + ((seeds >> 32) & _WORD)) & _WORD)
    key = _mix((key + 0x9E3779B9 * positions) & _WORD)
    tokens = _mix(torch.arange(1, vocab_size + 1, device=seeds.device))
    bits = _mix(key.unsqueeze(1) ^ tokens)
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


class ReferenceSample:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

    def sample(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        last_ids: Tensor,
        limits: Limits | None = None,
    ) -> Tensor:
        """See `Sample`."""
        thresholds = None if limits is None else self.thresholds(logits, slots, temperatures, limits)
        last_ids[slots] = ids = self.choose(logits, temperatures[slots], seeds[slots], positions.long(), thresholds)
        return ids

    def choose(
        self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, thresholds: Tensor | None
    ) -> Tensor:
        """[R] int64 ids as of `Sample.sample`, where all is given by row; logits below thresholds [R] are excluded."""
        logits = logits.float()
        if thresholds is not None:
            logits = logits.masked_fill(logits < thresholds.unsqueeze(1), -torch.inf)
        random = temperatures > 0
        scaled = logits / torch.where(random, temperatures, 1.0).unsqueeze(1)
        noise = gumbel_noise(seeds, positions, logits.shape[1])
        return torch.where(random.unsqueeze(1), scaled + noise, logits).argmax(1)

    def thresholds(self, logits: Tensor, slots: Tensor, temperatures: Tensor, limits: Limits) -> Tensor:
        """[R] float32, below which logits [R, V] are excluded; mostly among a row's largest, else all are ordered."""
        logits = logits.float()
        filters = (temperatures[slots], limits.top_ks[slots], limits.top_ps[slots], limits.min_ps[slots])
        for num in (_NUM_CANDIDATES, logits.shape[1]):
            lowest, settled = _lowest_kept(logits, min(num, logits.shape[1]), *filters)
            if settled:
                break
        return lowest

    def penalize(
        self, logits: Tensor, slots: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
    ) -> Tensor:
        """See `Sample`."""
        seen, logits = counts[slots], logits.float()
        generated = seen // GENERATED
        factor = repetition.unsqueeze(1)
        penalized = torch.where(seen > 0, torch.where(logits > 0, logits / factor, logits * factor), logits)
        return penalized - frequency.unsqueeze(1) * generated - presence.unsqueeze(1) * (generated > 0)

    def logprobs(self, logits: Tensor, ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Sample`."""
        logprobs = logits.float().log_softmax(-1)
        top, top_ids = logprobs.topk(num_top, -1)
        return logprobs.gather(1, ids), top_ids, top


def _lowest_kept(
    logits: Tensor, num: int, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
) -> tuple[Tensor, bool]:
    """Thresholds [R] by the largest `num` logits of each row, and whether these were enough to tell."""
    vocab_size, random = logits.shape[1], temperatures > 0
    limited, cut = random & (top_ks > 0) & (top_ks < vocab_size), random & (top_ps < 1)
    scales = torch.where(random, temperatures, 1.0).unsqueeze(1)
    ordered = logits.topk(num).values
    kth = ordered.gather(1, torch.where(limited, top_ks - 1, 0).clamp(max=num - 1).unsqueeze(1)).squeeze(1)
    lowest = torch.where(limited, kth, -torch.inf)
    kept = (ordered / scales).masked_fill(ordered < lowest.unsqueeze(1), -torch.inf)
    totals = torch.where(limited, kept.logsumexp(1), (logits / scales).logsumexp(1))
    probs = (kept - totals.unsqueeze(1)).exp()
    num_kept = ((probs.cumsum(1) - probs) < top_ps.unsqueeze(1)).sum(1).clamp(1)
    nucleus = ordered.gather(1, (num_kept - 1).unsqueeze(1)).squeeze(1)
    settled = num == vocab_size or not bool((limited & (ordered[:, -1] >= kth) | cut & (num_kept == num)).any())
    lowest = torch.where(cut, torch.maximum(lowest, nucleus), lowest)
    lowest = torch.where(random, torch.maximum(lowest, ordered[:, 0] + temperatures * min_ps.log()), -torch.inf)
    return lowest, settled


BACKEND = ReferenceSample()
