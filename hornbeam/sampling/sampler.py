"""From logits to ids and logprobs. Owns the sampling tensors, by slot.

What no request of a batch asks for is not computed: the host knows which slots use what.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hornbeam.core.plan import SlotStart
from hornbeam.core.request import LogprobOptions
from hornbeam.ops.sample.contract import Limits, Sample
from hornbeam.sampling.biases import Biases
from hornbeam.sampling.logprobs import Logprobs, RowLogprobs, rows_of
from hornbeam.sampling.penalties import Penalties


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Ids of R rows, int64, and the logprobs of those rows that want any."""

    ids: Tensor
    logprob_rows: Sequence[int] = ()
    logprobs: RowLogprobs | None = None

    def download(self) -> "Sampled":
        """The same on the CPU, without waiting: valid once the device has done what was enqueued so far."""
        logprobs = None if self.logprobs is None else self.logprobs.download()
        return replace(self, ids=self.ids.to("cpu", non_blocking=True), logprobs=logprobs)


class Sampler:
    """One row of parameters per slot; the last slot belongs to padding rows and is greedy."""

    def __init__(self, num_slots: int, vocab_size: int, op: Sample, device: torch.device) -> None:
        num_rows = num_slots + 1
        self._op = op
        # Temperature, top-p and min-p; the repetition, frequency and presence penalty.
        neutral = torch.tensor((0.0, 1.0, 0.0, 1.0, 0.0, 0.0), device=device)
        self._floats = neutral.unsqueeze(1).repeat(1, num_rows)
        self._integers = torch.zeros((2, num_rows), dtype=torch.int64, device=device)  # seed and top-k
        self._limits = Limits(top_ks=self._integers[1], top_ps=self._floats[1], min_ps=self._floats[2])
        self._penalties = Penalties(num_rows, vocab_size, op, device)
        self._biases = Biases(num_rows, device)
        self._logprobs = Logprobs(num_rows, op, device)
        # What the host knows: slots whose requests exclude tokens, have penalties or biases, want logprobs.
        self._filtered: set[int] = set()
        self._penalized: set[int] = set()
        self._biased: set[int] = set()
        self._options: dict[int, LogprobOptions] = {}

    def pack(self, starts: Sequence[SlotStart]) -> dict[str, np.ndarray]:
        """Remember on the host what the requests that start use; what `start` must be given, all 64 bits wide."""
        biased_before = self._biased.intersection(start.slot for start in starts)  # whose lists must be emptied
        for users in (self._filtered, self._penalized, self._biased):
            users.difference_update(start.slot for start in starts)
        for start in starts:
            self._options.pop(start.slot, None)
        packing = {
            "slots": np.array([start.slot for start in starts]),
            "floats": np.array([_floats_of(start) for start in starts], dtype=np.float64),
            "integers": np.array([(start.seed, max(start.sampling.top_k, 0)) for start in starts]),
        }
        self._filtered.update(start.slot for start in starts if start.sampling.filters)
        if penalized := [start for start in starts if start.sampling.penalizes]:
            self._penalized.update(start.slot for start in penalized)
            packing |= _prefixed("penalties", self._penalties.pack(penalized))
        biased = [start for start in starts if start.banned_ids or start.sampling.logit_bias]
        self._biased.update(start.slot for start in biased)
        if listed := biased + [start for start in starts if start.slot in biased_before - self._biased]:
            packing |= _prefixed("biases", self._biases.pack(listed))
        if options := {start.slot: start.logprobs for start in starts if start.logprobs is not None}:
            self._options.update(options)
            packing |= _prefixed("logprobs", self._logprobs.pack(options))
        return packing

    def start(self, parts: Mapping[str, Tensor]) -> None:
        """Set on the device what `pack` has packed, each part as flat int64."""
        slots = parts["slots"]
        self._floats[:, slots] = parts["floats"].view(torch.float64).float().view(len(slots), -1).T
        self._integers[:, slots] = parts["integers"].view(len(slots), -1).T
        features: dict[str, Any] = {"penalties": self._penalties, "biases": self._biases, "logprobs": self._logprobs}
        for prefix, feature in features.items():
            own = {name.removeprefix(prefix + "."): part for name, part in parts.items() if name.startswith(prefix)}
            if own:
                feature.start(**own)

    def rows_with_logprobs(self, host_slots: Sequence[int]) -> list[int]:
        """Which of the rows of these slots want logprobs."""
        return [row for row, slot in enumerate(host_slots) if slot in self._options] if self._options else []

    def sample(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        last_ids: Tensor,
        host_slots: Sequence[int],
        logprob_rows: Tensor,
    ) -> Sampled:
        """Choose an id per row, and write it to its slot's place in `last_ids`, [slots + 1] int64.

        logits: [R, V]; slots: [R] int64, on the host `host_slots`; positions: [R] int64 or int32 of the ids to choose;
        logprob_rows: `rows_with_logprobs(host_slots)` as a tensor.
        """
        scores = logits
        penalized = _any_of(self._penalized, host_slots)
        if penalized:
            scores = self._penalties.apply(scores, slots, self._floats[3:, slots])
        if _any_of(self._biased, host_slots):
            scores = self._biases.add(scores, slots, positions)
        limits = self._limits if _any_of(self._filtered, host_slots) else None
        ids = self._op.sample(scores, slots, positions, self._floats[0], self._integers[0], last_ids, limits)
        if penalized:
            self._penalties.count(slots, ids)
        host_rows = self.rows_with_logprobs(host_slots)
        if not host_rows:
            return Sampled(ids=ids)
        host_slots = [host_slots[row] for row in host_rows]
        logprobs = self.score(rows_of(logits), logprob_rows, ids[logprob_rows], slots[logprob_rows], host_slots)
        return Sampled(ids=ids, logprob_rows=host_rows, logprobs=logprobs)

    def score(
        self, logits_of: Callable[[Tensor], Tensor], rows: Tensor, ids: Tensor, slots: Tensor, host_slots: Sequence[int]
    ) -> RowLogprobs:
        """Logprobs of the tokens `ids`, and of what else their requests ask for: see `Logprobs.score`."""
        options = [self._options[slot] for slot in host_slots]
        return self._logprobs.score(logits_of, rows, ids, slots, options)


def _any_of(users: set[int], host_slots: Sequence[int]) -> bool:
    """Whether any of the slots is in use by one of `users`; mostly there are none."""
    return bool(users) and not users.isdisjoint(host_slots)


def _floats_of(start: SlotStart) -> tuple[float, ...]:
    """In the order of the table's rows."""
    sampling = start.sampling
    temperature = 0.0 if sampling.greedy else sampling.temperature
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    return (temperature, sampling.top_p, sampling.min_p, *penalties)


def _prefixed(prefix: str, packing: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}.{name}": array for name, array in packing.items()}
