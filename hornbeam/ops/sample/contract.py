"""Choosing ids from logits by Gumbel noise (Gumbel-max): argmax(logits / temperature + noise) samples the softmax.

The noise of a token depends only on (seed, position, token id), so a request's text does not depend on what else
is in its batch. All backends draw the same noise:

    mix(h)  = the 32-bit finalizer h ^= h >> 16; h *= 0x85EBCA6B; h ^= h >> 13; h *= 0xC2B2AE35; h ^= h >> 16
    key     = mix(mix(low word of seed) + high word of seed) ; then mix(key + 0x9E3779B9 * position)
    bits    = mix(key ^ mix(token id + 1))                        (all modulo 2^32)
    noise   = -log(-log(((bits >> 9) + 0.5) * 2^-23))
"""

from typing import Protocol

from torch import Tensor

from hornbeam.core.registry import Registry
from hornbeam.ops.query import OpQuery


class Sample(Protocol):
    """R rows, V vocabulary entries."""

    def supports(self, query: OpQuery) -> str | None:
        """None, or the reason why not."""

    def sample(self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """[R] int64 ids from logits [R, V] (any float dtype; -inf excludes a token).

        temperatures: [R] float32, 0 for argmax without noise (the lowest id wins a tie); seeds, positions: [R] int64.
        """


SAMPLE: Registry[OpQuery, Sample] = Registry(
    "sample", {"triton": "hornbeam.ops.sample.triton:BACKEND", "reference": "hornbeam.ops.sample.reference:BACKEND"}
)
