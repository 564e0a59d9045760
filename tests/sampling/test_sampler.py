"""Sampling: exact where it is exact, distributed as asked where it is random, independent of the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hornbeam.core.plan import SlotStart
from hornbeam.core.request import LogprobOptions, SamplingParams
from hornbeam.ops.sample.contract import Limits
from hornbeam.ops.sample.reference import ReferenceSample, gumbel_noise
from hornbeam.sampling.sampler import Sampled, Sampler

pytestmark = pytest.mark.cpu


CPU = torch.device("cpu")


def make_sampler(*params: SamplingParams, vocab_size: int = 1000, **options: object) -> Sampler:
    """Slot i has params[i]; every slot's seed is 100 + i. `options`: of all starts."""
    sampler = Sampler(len(params), vocab_size, ReferenceSample(), CPU)
    start(
        sampler, *(SlotStart(slot=i, num_cached=0, sampling=p, seed=100 + i, **options) for i, p in enumerate(params))
    )
    return sampler


def start(sampler: Sampler, *starts: SlotStart) -> None:
    sampler.start(
        {name: torch.from_numpy(array.reshape(-1).view(np.int64)) for name, array in sampler.pack(starts).items()}
    )


def sample(sampler: Sampler, logits: torch.Tensor, slots: list[int], positions: list[int]) -> Sampled:
    host = tuple(slots)
    rows = torch.tensor(sampler.rows_with_logprobs(host), dtype=torch.int64)
    last_ids = torch.zeros(max(slots) + 1, dtype=torch.int64)
    return sampler.sample(logits, torch.tensor(slots), torch.tensor(positions), last_ids, host, rows)


def draw(sampler: Sampler, logits: torch.Tensor, slots: list[int], positions: list[int]) -> list[int]:
    return sample(sampler, logits, slots, positions).ids.tolist()


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


def thresholds(
    logits: torch.Tensor, temperatures: torch.Tensor, *limits: torch.Tensor, **by_name: torch.Tensor
) -> torch.Tensor:
    """By row."""
    limits = Limits(**dict(zip(("top_ks", "top_ps", "min_ps"), limits, strict=False)), **by_name)
    return ReferenceSample().thresholds(logits, torch.arange(len(logits)), temperatures, limits)


def test_thresholds_leave_greedy_rows_alone_and_always_one_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 5)
    lowest = thresholds(
        logits,
        temperatures=torch.tensor([0.0, 1.0, 1.0, 0.5, 1.0]),
        top_ks=torch.tensor([1, 0, 2, 0, 9]),
        top_ps=torch.tensor([0.1, 1e-9, 1.0, 1.0, 1.0]),
        min_ps=torch.tensor([0.5, 0.0, 0.0, 0.1, 0.0]),
    )
    assert lowest.tolist() == [-torch.inf, 3.0, 2.0, pytest.approx(3 + 0.5 * math.log(0.1)), -torch.inf]


def test_tokens_with_equal_logits_stay_or_go_together() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]] * 2)
    ones, zeros = torch.ones(2), torch.zeros(2)
    lowest = thresholds(logits, ones, torch.tensor([2, 0]), torch.tensor([1.0, 0.6]), zeros)
    assert lowest.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rounded", [False, True])
def test_thresholds_by_the_largest_logits_are_those_by_all(rounded: bool) -> None:
    """Rows that settle early and rows that do not; rounded, so that many logits are equal."""
    num_rows, vocab_size = 24, 3000
    torch.manual_seed(0)
    logits = torch.randn(num_rows, vocab_size) * torch.linspace(0.1, 6, num_rows).unsqueeze(1)
    logits = logits.round() if rounded else logits
    top_ks = torch.tensor([0, 1, 40, 1023, 1024, 1500, 2999, 10**6]).repeat(3)
    top_ps = torch.tensor([1.0, 0.3, 0.95]).repeat_interleave(8)
    temperatures = torch.tensor([0.7, 1.0, 0.0]).repeat(8)
    lowest = thresholds(logits, temperatures, top_ks, top_ps, torch.zeros(num_rows))
    alone = [
        thresholds(
            logits[row : row + 1].expand(2, -1),
            temperatures[[row, row]],
            torch.stack((top_ks[row], torch.tensor(2999))),  # the second row needs all
            torch.stack((top_ps[row], torch.tensor(0.9999))),
            torch.zeros(2),
        )[0]
        for row in range(num_rows)
    ]
    torch.testing.assert_close(lowest, torch.stack(alone))
    for row, threshold in enumerate(lowest.tolist()):
        num_kept = int((logits[row] >= threshold).sum())
        if temperatures[row] == 0 or (top_ps[row] == 1 and not 0 < top_ks[row] < vocab_size):
            assert num_kept == vocab_size
        elif top_ps[row] == 1:
            assert num_kept >= top_ks[row] > int((logits[row] > threshold).sum())


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = torch.log(torch.tensor([0.5, 0.2, 0.06, 0.24]))
    sampler = make_sampler(SamplingParams(min_p=0.3))
    assert set(draw(sampler, logits.expand(500, -1), [0] * 500, list(range(500)))) == {0, 1, 3}


def test_logprobs_are_of_the_raw_distribution_and_as_many_as_asked() -> None:
    logits = torch.randn(4, 20)
    params = (SamplingParams(temperature=0), SamplingParams(temperature=0.3, top_k=2, logit_bias=((3, 5.0),)))
    wanted = [None, LogprobOptions(num_top=4), LogprobOptions(token_ids=(7, 3)), LogprobOptions()]
    sampler = Sampler(4, 20, ReferenceSample(), CPU)
    start(
        sampler,
        *(SlotStart(slot=i, num_cached=0, sampling=params[i % 2], seed=i, logprobs=wanted[i]) for i in range(4)),
    )
    sampled = sample(sampler, logits, [0, 1, 2, 3], [3] * 4)
    expected = logits.log_softmax(-1)
    assert sampled.logprob_rows == [1, 2, 3]
    assert sampled.logprobs is not None
    entries = dict(zip(sampled.logprob_rows, sampled.logprobs.read(), strict=True))
    for row, entry in entries.items():
        assert entry.chosen == pytest.approx(expected[row, sampled.ids[row]].item(), abs=1e-5)
    values, ids = expected[1].topk(4)
    assert [token for token, _ in entries[1].top] == ids.tolist()
    assert [value for _, value in entries[1].top] == pytest.approx(values.tolist(), abs=1e-5)
    assert entries[2].asked == pytest.approx(expected[2, [7, 3]].tolist(), abs=1e-5)
    assert entries[2].top == entries[3].top == entries[3].asked == ()


def test_a_ban_ends_at_its_position_and_biases_do_not() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2] = 1.0
    params = SamplingParams(temperature=0, logit_bias=((4, 0.5), (0, -1.0)))
    sampler = make_sampler(params, vocab_size=5, banned_ids=(2, 3), banned_until=8)
    assert [draw(sampler, logits, [0], [position]) for position in (6, 7, 8, 9)] == [[4], [4], [2], [2]]
    start(sampler, SlotStart(slot=0, num_cached=0, sampling=SamplingParams(temperature=0), seed=1))
    assert draw(sampler, logits, [0], [6]) == [2], "the slot's next request has no biases"


def test_what_a_slot_was_used_for_before_does_not_count_beside_others() -> None:
    logits = torch.zeros(2, 5)
    logits[:, 2] = 1.0
    greedy = SamplingParams(temperature=0)
    biased = SamplingParams(temperature=0, logit_bias=((4, 9.0),), presence_penalty=2.0)
    sampler = make_sampler(biased, biased, vocab_size=5, prompt_ids=(2,), generated_ids=(2,))
    start(sampler, SlotStart(slot=0, num_cached=0, sampling=greedy, seed=1))
    assert draw(sampler, logits, [0, 1], [6, 6]) == [2, 4]


def plain_penalties(logits: list[float], prompt: tuple[int, ...], generated: list[int], params: SamplingParams) -> list:
    """The definition, token by token."""
    result = []
    for token, value in enumerate(logits):
        count = generated.count(token)
        if count or token in prompt:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        result.append(value - params.frequency_penalty * count - params.presence_penalty * (count > 0))
    return result


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_penalties_over_random_programs(data: st.DataObject) -> None:
    """Slots start, decode in any batches, and are retracted to another slot with their history: the ids are those of
    the definition, greedily."""
    vocab_size, num_slots = 6, 3
    sampler = Sampler(num_slots, vocab_size, ReferenceSample(), CPU)
    running: dict[int, tuple[tuple[int, ...], list[int], SamplingParams]] = {}
    tokens = st.integers(0, vocab_size - 1)
    for _ in range(data.draw(st.integers(1, 25))):
        free = [slot for slot in range(num_slots) if slot not in running]
        action = data.draw(st.sampled_from(["start", "retract", "decode", "decode", "decode"]))
        if action == "start" and free:
            params = SamplingParams(
                temperature=0,
                frequency_penalty=data.draw(st.sampled_from([0.0, 0.7, -1.0])),
                presence_penalty=data.draw(st.sampled_from([0.0, 1.1])),
                repetition_penalty=data.draw(st.sampled_from([1.0, 1.7, 0.6])),
            )
            slot = data.draw(st.sampled_from(free))
            running[slot] = (tuple(data.draw(st.lists(tokens, min_size=1, max_size=5))), [], params)
            begin(sampler, slot, *running[slot])
        elif action == "retract" and running:
            slot = data.draw(st.sampled_from(sorted(running)))
            state = running.pop(slot)
            target = data.draw(st.sampled_from([slot, *free]))
            running[target] = state
            begin(sampler, target, *state)
        elif action == "decode" and running:
            slots = data.draw(st.lists(st.sampled_from(sorted(running)), min_size=1, unique=True))
            logits = torch.tensor([[data.draw(st.integers(-40, 40)) / 7 for _ in range(vocab_size)] for _ in slots])
            ids = draw(sampler, logits, slots, [0] * len(slots))
            for slot, row, token in zip(slots, logits.tolist(), ids, strict=True):
                prompt, generated, params = running[slot]
                expected = plain_penalties(row, prompt, generated, params)
                assert expected[token] == pytest.approx(max(expected), abs=1e-5)
                generated.append(token)


def begin(sampler: Sampler, slot: int, prompt: tuple[int, ...], generated: list[int], params: SamplingParams) -> None:
    history = {"prompt_ids": prompt, "generated_ids": tuple(generated)} if params.penalizes else {}
    start(sampler, SlotStart(slot=slot, num_cached=0, sampling=params, seed=0, **history))
