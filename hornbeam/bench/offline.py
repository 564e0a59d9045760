"""Runs offline workloads on an engine and measures them: token ids in, exact numbers of token ids out, no text."""

import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from hornbeam.bench.workloads import Workload
from hornbeam.core.errors import HornbeamError


class Generator(Protocol):
    """What is measured: `hornbeam.Engine`, or something that calls alike."""

    def generate(self, *, input_ids: list[list[int]], sampling_params: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `hornbeam.Engine`."""

    def flush_cache(self) -> bool:
        """See `hornbeam.Engine`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The fastest run of one workload."""

    workload: str
    num_requests: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    seconds: float

    @property
    def output_rate(self) -> float:
        """Generated tokens per second."""
        return self.output_tokens / self.seconds

    @property
    def total_rate(self) -> float:
        """Tokens per second, prompts included."""
        return (self.input_tokens + self.output_tokens) / self.seconds

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        rates = {"output_tokens_per_second": self.output_rate, "total_tokens_per_second": self.total_rate}
        return asdict(self) | {name: round(rate, 2) for name, rate in rates.items()}


def measure(engine: Generator, workload: Workload) -> Measurement:
    """Run `workload` as often as it asks for, each time with an empty prefix cache.

    Raises:
        HornbeamError: an answer has not exactly the length that was asked for.
    """
    return min((_run(engine, workload) for _ in range(workload.num_runs)), key=lambda run: run.seconds)


def _run(engine: Generator, workload: Workload) -> Measurement:
    prompts = [list(prompt) for prompt in workload.prompts]
    params = [
        {"max_new_tokens": length, "temperature": workload.temperature, "ignore_eos": True}
        for length in workload.output_lens
    ]
    if not engine.flush_cache():
        raise HornbeamError("the prefix cache could not be flushed: requests are running")
    started = time.perf_counter()
    answers = engine.generate(input_ids=prompts, sampling_params=params)
    seconds = time.perf_counter() - started
    for index, (answer, length) in enumerate(zip(answers, workload.output_lens, strict=True)):
        if len(answer["output_ids"]) != length:
            raise HornbeamError(
                f"{workload.name}: request {index} has {len(answer['output_ids'])} tokens, not {length}: "
                f"{answer['meta_info'].get('finish_reason')}"
            )
    return Measurement(
        workload=workload.name,
        num_requests=len(prompts),
        input_tokens=sum(map(len, prompts)),
        output_tokens=sum(workload.output_lens),
        cached_tokens=sum(answer["meta_info"]["cached_tokens"] for answer in answers),
        seconds=seconds,
    )
