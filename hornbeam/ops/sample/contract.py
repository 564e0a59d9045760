"""From logits to ids: penalties, thresholds that exclude unlikely tokens, and a choice by Gumbel noise.

Choosing argmax(logits / temperature + noise) samples the softmax (Gumbel-max). The noise of a token depends only on
(seed, position, token id), so a request's text does not depend on what else is in its batch. All backends draw the
same noise:

    mix(h)  = the 32-bit finalizer h ^= h >> 16; h *= 0x85EBCA6B; h ^= h >> 13; h *= 0xC2B2AE35; h ^= h >> 16
    key     = mix(mix(low word of seed) + high word of seed) ; then mix(key + 0x9E3779B9 * position)
    bits    = mix(key ^ mix(token id + 1))                        (all modulo 2^32)
    noise   = -log(-log(((bits >> 9) + 0.5) * 2^-23))

What a row excludes is told by one number: tokens whose logit is below it. So tokens with equal logits stay or go
together, and nothing has to be sorted.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery

GENERATED = 2  # what one generated token adds to its entry in `counts`; a token of the prompt has the lowest bit set


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What unlikely tokens are excluded, for S slots: all below the lowest logit that each of these keeps.

    Of the values that occur, the largest at or above which there are `top_k` tokens; of those left, the largest at or
    above which `top_p` of their mass is (Holtzman et al., 2020); and the likeliest token's probability times `min_p`.
    """

    top_ks: Tensor  # [S] int64, 0 for all
    top_ps: Tensor  # [S] float32, 1 for all
    min_ps: Tensor  # [S] float32, 0 for all


class Sample(Protocol):
    """R rows, V vocabulary entries, S slots."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

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
        """[R] int64 ids from logits [R, V] (any float dtype; -inf excludes a token), written to `last_ids`, too.

        Args:
            slots: [R] int64, different ones but for padding.
            positions: [R] int64 or int32, of the ids to choose.
            temperatures: [S] float32, 0 for argmax without noise (the lowest id wins a tie).
            seeds: [S] int64.
            last_ids: [S] int64.
            limits: of slots; greedy ones keep everything.
        """

    def penalize(
        self, logits: Tensor, slots: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
    ) -> Tensor:
        """[R, V] float32, new: logits [R, V] of `slots` [R] int64, made less likely by what the slots have seen.

        counts: [S, V] int32, GENERATED for each time a token was generated, and 1 if it stands in the prompt.
        A token that was seen at all has its logit divided by `repetition` if that is positive, else multiplied by it
        (Keskar et al., 2019); then `frequency` is taken off for each time it was generated, and `presence` once.
        All three: [R] float32; 1, 0 and 0 change nothing.
        """

    def logprobs(self, logits: Tensor, ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of logits [R, V] without temperature.

        Returns: [R, W] float32, of the tokens `ids` [R, W] int64; [R, num_top] int64, the likeliest tokens, from the
            likeliest on, num_top <= V; [R, num_top] float32, theirs.
        """


SAMPLE: Registry[OpQuery, Sample] = Registry(
    "sample",
    {
        "triton": "hornbeam.ops.sample.triton:BACKEND",
        "cpu": "hornbeam.ops.sample.cpu:BACKEND",
        "reference": "hornbeam.ops.sample.reference:BACKEND",
    },
)
