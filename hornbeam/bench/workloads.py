"""The offline workloads: prompt ids and output lengths, the same draws on every run and machine.

`scale` shrinks numbers of requests and lengths alike; at 1 the draws are those that published figures were taken with.
Standard library only.
"""

from collections.abc import Callable, Sequence
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


def long(scale: float = 1.0) -> Workload:
    """24 requests of 6,000 to 8,000 tokens, 200 out."""
    return _drawn("long", Random(10), scale, num=24, num_in=(6000, 8000), num_out=(200, 200))


def huge(scale: float = 1.0) -> Workload:
    """3 requests of 30,000 tokens, 100 out."""
    return _drawn("huge", Random(11), scale, num=3, num_in=(30_000, 30_000), num_out=(100, 100))


def tree(scale: float = 1.0) -> Workload:
    """64 leaves of a tree: 1,024 tokens, 4 branches of 2,048, each with 8 of 1,000, each with 2 of 100; 100 out."""
    random = Random(12)
    prompts = [_draw(random, _scaled(1024, scale))]
    for num_branches, length in ((4, 2048), (8, 1000), (2, 100)):
        prompts = _branches(random, prompts, num_branches, scale, (length, length))
    return Workload(name="tree", prompts=tuple(prompts), output_lens=(_scaled(100, scale),) * len(prompts))


def deep(scale: float = 1.0) -> Workload:
    """64 leaves, of 64 tokens, below six levels of 512 to 1,024 tokens that each branch in two; 100 out."""
    random = Random(13)
    prompts: list[tuple[int, ...]] = [()]
    for _ in range(6):
        prompts = _branches(random, prompts, 2, scale, (512, 1024))
    prompts = _branches(random, prompts, 1, scale, (64, 64))
    return Workload(name="deep", prompts=tuple(prompts), output_lens=(_scaled(100, scale),) * len(prompts))


def repeats(scale: float = 1.0) -> Workload:
    """8 prompts of 1,500 tokens, 16 times each, interleaved; 100 out."""
    random = Random(14)
    prompts = tuple(_draw(random, _scaled(1500, scale)) for _ in range(8)) * 16
    return Workload(name="repeats", prompts=prompts, output_lens=(_scaled(100, scale),) * len(prompts))


def same(scale: float = 1.0) -> Workload:
    """One prompt of 3,000 tokens, 64 times, 100 out."""
    prompts = (_draw(Random(15), _scaled(3000, scale)),) * 64
    return Workload(name="same", prompts=prompts, output_lens=(_scaled(100, scale),) * len(prompts))


def short(scale: float = 1.0) -> Workload:
    """1,000 requests of 20 tokens, 8 out."""
    return _drawn("short", Random(16), scale, num=1000, num_in=(20, 20), num_out=(8, 8))


def medium(scale: float = 1.0) -> Workload:
    """600 requests of 50 to 150 tokens, 20 to 60 out: prompts come and go all the time."""
    return _drawn("medium", Random(17), scale, num=600, num_in=(50, 150), num_out=(20, 60))


def many(scale: float = 1.0) -> Workload:
    """768 requests of 200 to 1,000 tokens, 100 to 300 out: three times as many as run at once."""
    return _drawn("many", Random(18), scale, num=768, num_in=(200, 1000), num_out=(100, 300))


KINDS: dict[str, Callable[[float], Workload]] = {
    "long": long,
    "huge": huge,
    "tree": tree,
    "deep": deep,
    "repeats": repeats,
    "same": same,
    "short": short,
    "medium": medium,
    "many": many,
}


def _drawn(
    name: str, random: Random, scale: float, *, num: int, num_in: tuple[int, int], num_out: tuple[int, int]
) -> Workload:
    """`num` requests with lengths uniform in these ranges."""
    (least_in, most_in), (least_out, most_out) = ((_scaled(a, scale), _scaled(b, scale)) for a, b in (num_in, num_out))
    num = _scaled(num, scale)
    prompts = tuple(_draw(random, random.randint(least_in, most_in)) for _ in range(num))
    output_lens = tuple(random.randint(least_out, most_out) for _ in range(num))
    return Workload(name=name, prompts=prompts, output_lens=output_lens)


def _branches(
    random: Random, prompts: Sequence[tuple[int, ...]], num: int, scale: float, length: tuple[int, int]
) -> list[tuple[int, ...]]:
    """Each of the prompts, continued in `num` ways."""
    least, most = (_scaled(end, scale) for end in length)
    return [prompt + _draw(random, random.randint(least, most)) for prompt in prompts for _ in range(num)]


def _scaled(number: int, scale: float) -> int:
    return max(1, round(number * scale))


def _draw(random: Random, num: int) -> tuple[int, ...]:
    return tuple(random.randrange(_FIRST_ID, _END_ID) for _ in range(num))
