"""Gumbel-max sampling in plain torch."""

import torch
from torch import Tensor

from hornbeam.ops.query import OpQuery

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

    def sample(self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """See `Sample`."""
        logits = logits.float()
        random = temperatures > 0
        scaled = logits / torch.where(random, temperatures, 1.0).unsqueeze(1)
        noise = gumbel_noise(seeds, positions, logits.shape[1])
        return torch.where(random.unsqueeze(1), scaled + noise, logits).argmax(1)


BACKEND = ReferenceSample()
