"""Sampling on a CPU: noise only for the rows that want it, and a faster search for the largest of many logits."""

import torch
from torch import Tensor

from hornbeam.ops.device import needs_cpu
from hornbeam.ops.query import OpQuery
from hornbeam.ops.sample.reference import ReferenceSample

_BLOCK = 256


class CpuSample(ReferenceSample):
    """See `Sample`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs."""
        return needs_cpu(query)

    def choose(
        self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, thresholds: Tensor | None
    ) -> Tensor:
        """See `ReferenceSample`."""
        ids = lowest_argmax(logits)
        rows = temperatures.nonzero().squeeze(1)
        if len(rows):
            kept = None if thresholds is None else thresholds[rows]
            ids[rows] = super().choose(logits[rows], temperatures[rows], seeds[rows], positions[rows], kept)
        return ids


def lowest_argmax(logits: Tensor) -> Tensor:
    """[R] int64: where the largest of logits [R, V] stands, the first time it does.

    torch compares value by value when it looks for the place of a maximum, but many values at once when it looks for
    the maximum alone: so the block that holds it is found first.
    """
    if logits.shape[1] % _BLOCK:
        return logits.argmax(1)
    blocks = logits.unflatten(1, (-1, _BLOCK))
    block: Tensor = blocks.amax(-1).argmax(1)
    within: Tensor = blocks[torch.arange(len(logits)), block].argmax(1)
    return block * _BLOCK + within


BACKEND = CpuSample()
