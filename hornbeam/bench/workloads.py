"""The offline workloads: prompt ids and output lengths, the same draws on every run and machine.

`scale` shrinks numbers of requests and lengths alike; at 1 the draws are those that published figures were taken with.
Standard library only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

_FIRST_ID, _END_ID = 5, 10000  # prompt ids are uniform in this range


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts and, for each, the exact number of tokens to generate."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]
    temperature: float = 0.8
    num_runs: int = 1  # the best counts


def mix(scale: float = 1.0) -> Workload:
    """256 requests with prompts and outputs of 100 to 1024 tokens: the general case."""
    random, num, shortest, longest = Random(1), _scaled(256, scale), _scaled(100, scale), _scaled(1024, scale)
    prompts = tuple(_draw(random, random.randint(shortest, longest)) for _ in range(num))
    output_lens = tuple(random.randint(shortest, longest) for _ in range(num))
    return Workload(name="mix", prompts=prompts, output_lens=output_lens)


def single(scale: float = 1.0) -> Workload:
    """One request of 128 tokens, 256 out, greedy: the speed of decoding alone."""
    prompt = _draw(Random(2), _scaled(128, scale))
    return Workload(name="single", prompts=(prompt,), output_lens=(_scaled(256, scale),), temperature=0.0, num_runs=2)


def prefix(scale: float = 1.0) -> Workload:
    """16 groups of 16 requests, interleaved; a group shares 2048 tokens, each request adds 64; 64 out."""
    random, num_groups, per_group = Random(3), _scaled(16, scale), _scaled(16, scale)
    shared = [_draw(random, _scaled(2048, scale)) for _ in range(num_groups)]
    num = num_groups * per_group
    prompts = tuple(shared[i % num_groups] + _draw(random, _scaled(64, scale)) for i in range(num))
    return Workload(name="prefix", prompts=prompts, output_lens=(_scaled(64, scale),) * num)


def prefill(scale: float = 1.0) -> Workload:
    """32 prompts of 4096 tokens, one token out."""
    random, num = Random(4), _scaled(32, scale)
    prompts = tuple(_draw(random, _scaled(4096, scale)) for _ in range(num))
    return Workload(name="prefill", prompts=prompts, output_lens=(1,) * num)


def warm_up(scale: float = 1.0) -> tuple[Workload, Workload]:
    """Run before any clock starts: two short prompts, then 32 of 200 tokens."""
    random = Random(0)
    short = tuple(_draw(random, _scaled(size, scale)) for size in (16, 33))
    many = tuple(_draw(random, _scaled(200, scale)) for _ in range(_scaled(32, scale)))
    return (
        Workload(name="warm-up", prompts=short, output_lens=(8, 8)),
        Workload(name="warm-up", prompts=many, output_lens=(_scaled(16, scale),) * len(many)),
    )


WORKLOADS: dict[str, Callable[[float], Workload]] = {
    "mix": mix,
    "single": single,
    "prefix": prefix,
    "prefill": prefill,
}


def _scaled(number: int, scale: float) -> int:
    return max(1, round(number * scale))


def _draw(random: Random, num: int) -> tuple[int, ...]:
    return tuple(random.randrange(_FIRST_ID, _END_ID) for _ in range(num))
