"""Sampling: exact where it is exact, distributed as asked where it is random, independent of the batch."""

import pytest
import torch

from hornbeam.core.plan import SlotStart
from hornbeam.core.request import SamplingParams
from hornbeam.ops.sample.reference import ReferenceSample, gumbel_noise
from hornbeam.sampling.sampler import Sampler, keep_top, read_logprobs

pytestmark = pytest.mark.cpu


def make_sampler(*params: SamplingParams) -> Sampler:
    """Slot i has params[i]; every slot's seed is 100 + i."""
    sampler = Sampler(len(params), ReferenceSample(), torch.device("cpu"))
    starts = [SlotStart(slot=i, num_cached=0, sampling=p, seed=100 + i) for i, p in enumerate(params)]
    seeds, temperatures, top_ks, top_ps = zip(*map(sampler.note, starts), strict=True)
    sampler.start(
        torch.arange(len(params)),
        seeds=torch.tensor(seeds),
        temperatures=torch.tensor(temperatures),
        top_ks=torch.tensor(top_ks),
        top_ps=torch.tensor(top_ps),
    )
    return sampler


def draw(sampler: Sampler, logits: torch.Tensor, slots: list[int], positions: list[int]) -> list[int]:
    host = tuple(slots)
    sampled = sampler.sample(logits, torch.tensor(slots), torch.tensor(positions), host, top_logprobs=-1)
    return sampled.ids.tolist()


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(2, 50)
    sampler = make_sampler(SamplingParams(temperature=0), SamplingParams(temperature=2, top_k=1))
    assert draw(sampler, logits, [0, 1], [5, 6]) == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.5, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=2.0, top_k=5, top_p=0.7),
    ],
)
def test_frequencies_are_the_distribution_asked_for(params: SamplingParams) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0])
    expected = (logits / params.temperature).softmax(0)
    if params.top_k > 0:
        expected[params.top_k :] = 0
        expected /= expected.sum()
    expected[(expected.cumsum(0) - expected) >= params.top_p] = 0
    expected /= expected.sum()
    num = 20_000
    sampler = make_sampler(params)
    ids = draw(sampler, logits.expand(num, -1), [0] * num, list(range(num)))
    frequencies = torch.bincount(torch.tensor(ids), minlength=8) / num
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)
    assert (frequencies[expected == 0] == 0).all()


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    params = (SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(top_p=0.9))
    logits = torch.randn(3, 1000)
    sampler = make_sampler(*params)
    together = draw(sampler, logits, [0, 1, 2], [7, 8, 9])
    alone = [draw(sampler, logits[i : i + 1], [i], [7 + i])[0] for i in range(3)]
    assert together == alone
    other_positions = draw(sampler, logits[:1].expand(50, -1), [0] * 50, list(range(50)))
    assert len(set(other_positions)) > 10


def test_noise_differs_for_every_bit_of_the_seed() -> None:
    seeds = torch.tensor([0] + [1 << bit for bit in range(63)] + [-(2**63), -1])
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), 64)
    assert torch.isfinite(noise).all()
    assert len({tuple(row) for row in noise.tolist()}) == len(seeds)


def test_keep_top_leaves_greedy_rows_alone_and_always_one_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    kept = keep_top(
        logits,
        temperatures=torch.tensor([0.0, 1.0, 1.0]),
        top_ks=torch.tensor([1, 0, 2]),
        top_ps=torch.tensor([0.1, 1e-9, 1.0]),
    )
    assert kept[0].isfinite().tolist() == [True, True, True]
    assert kept[1].isfinite().tolist() == [False, True, False]
    assert kept[2].isfinite().tolist() == [False, True, True]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(2, 20)
    sampler = make_sampler(SamplingParams(temperature=0), SamplingParams(temperature=0.3, top_k=2))
    sampled = sampler.sample(logits, torch.tensor([0, 1]), torch.tensor([3, 3]), (0, 1), top_logprobs=4)
    expected = logits.log_softmax(-1)
    for row, (entry,) in enumerate(read_logprobs(sampled, 2)):
        assert entry.chosen == pytest.approx(expected[row, sampled.ids[row]].item())
        values, ids = expected[row].topk(4)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist())
