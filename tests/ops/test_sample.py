import random

import pytest
import torch

pytest.importorskip("triton")

from hornbeam.ops.sample.contract import Limits
from hornbeam.ops.sample.reference import ReferenceSample


def draw(device, num_rows, vocab_size, dtype=torch.float32):
    logits = (torch.randn(num_rows, vocab_size, device=device) * 3).to(dtype)
    slots = torch.randperm(num_rows + 3)[:num_rows].to(device)
    positions = torch.randint(0, 2**17, (num_rows,), device=device, dtype=torch.int32)
    temperatures = torch.tensor([0.8, 0.0, 1.0, 1.7], device=device).repeat(num_rows)[: num_rows + 3]
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows + 3,), device=device)
    return logits, slots, positions, temperatures, seeds, torch.full_like(seeds, -1)


@pytest.mark.parametrize("vocab_size", [7, 4096, 20000])
def test_ids_equal_the_references(device, dtype, vocab_size):
    from hornbeam.ops.sample.triton import BACKEND

    *inputs, last_ids = draw(device, 8, vocab_size, dtype)
    expected_last_ids = last_ids.clone()
    ids = BACKEND.sample(*inputs, last_ids)
    assert ids.tolist() == ReferenceSample().sample(*inputs, expected_last_ids).tolist()
    assert last_ids.tolist() == expected_last_ids.tolist()


@pytest.mark.parametrize("num_rows", [1, 9, 20])
def test_rows_that_share_a_program(device, num_rows, monkeypatch):
    from hornbeam.ops.sample import triton

    monkeypatch.setattr(triton, "_PROGRAMS", 4)
    inputs = draw(device, num_rows, 2100)
    assert triton.BACKEND.sample(*inputs).tolist() == ReferenceSample().sample(*inputs).tolist()


def test_a_stretch_with_a_lower_bound_may_have_the_best_token(device):
    """The noise's bound is the looser, the less noise there is: here the first stretch's is higher by 2.8 at most."""
    from hornbeam.ops.sample.reference import gumbel_noise
    from hornbeam.ops.sample.triton import BACKEND

    num = 6 * 1024
    zeros, ones = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, device=device)
    scores = torch.full((1, num), -30.0, device=device)
    noise = gumbel_noise(zeros, zeros, num)
    scores[0, noise[0, :1024].argmin()] = 1.0
    scores[0, 5 * 1024 + noise[0, 5 * 1024 :].argmax()] = 1.5
    ids = BACKEND.sample(scores - noise, zeros, zeros, ones, zeros, zeros.clone())
    assert ids[0] >= 5 * 1024
    for temperature in (1e-4, 0.01, 100.0):
        inputs = scores * temperature, zeros, zeros, ones * temperature, zeros, zeros.clone()
        assert BACKEND.sample(*inputs).tolist() == ReferenceSample().sample(*inputs).tolist()


def test_a_row_of_a_wider_tensor(device):
    from hornbeam.ops.sample.triton import BACKEND

    logits, *others = draw(device, 4, 5000)
    wide = torch.full((4, 6000), 100.0, device=device)
    wide[:, :5000] = logits
    assert BACKEND.sample(wide[:, :5000], *others).tolist() == ReferenceSample().sample(logits, *others).tolist()


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_ties_exclusions_and_nan(device):
    from hornbeam.ops.sample.triton import BACKEND

    logits = torch.full((4, 9000), -torch.inf, device=device)
    logits[0, [8999, 4500, 77]] = 1.0  # the lowest id of a tie
    logits[1, 5000] = -3.0  # the only one that is not excluded, whatever the noise
    logits[3] = torch.nan  # whatever it answers must be a token
    temperatures = torch.tensor([0.0, 1.0, 0.0, 1.0], device=device)
    slots = torch.arange(4, device=device)
    ids = BACKEND.sample(logits, slots, slots, temperatures, slots, slots.clone()).tolist()
    assert ids[:3] == [77, 5000, 0]
    assert 0 <= ids[3] < 9000


def draw_limits(device, num_rows):
    generator = random.Random(0)
    rows = [
        (generator.choice([0, 0, 1, 2, 5, 40, 10**6]), generator.choice([1.0, 1e-6, 0.3, 0.9, 0.999]))
        for _ in range(num_rows)
    ]
    top_ks = torch.tensor([top_k for top_k, _ in rows], device=device)
    top_ps = torch.tensor([top_p for _, top_p in rows], device=device)
    min_ps = torch.tensor([0.0, 0.0, 0.1, 1.0], device=device).repeat(num_rows)[:num_rows]
    return Limits(top_ks=top_ks, top_ps=top_ps, min_ps=min_ps)


@pytest.mark.parametrize("vocab_size", [7, 300, 5000])
def test_thresholds_equal_the_references(device, dtype, vocab_size):
    """Rounded logits have many ties; float32 ones nearly none."""
    from hornbeam.ops.sample.triton_thresholds import find_thresholds

    logits, slots, _, temperatures, *_ = draw(device, 16, vocab_size, dtype)
    logits[3] = 1.5  # all alike
    logits[5, ::2] = -torch.inf
    asked = slots, temperatures, draw_limits(device, 19)
    expected = ReferenceSample().thresholds(logits, *asked)
    torch.testing.assert_close(find_thresholds(logits, *asked)[0], expected, atol=1e-5, rtol=1e-6)


def assert_is_top_p(logits, threshold, top_p, temperature):
    """To a millionth of the mass, as sums in float32 are."""
    masses = (logits.double() / temperature).softmax(0)
    assert masses[logits > threshold].sum() < top_p + 1e-6
    assert masses[logits >= threshold].sum() > top_p - 1e-6
    assert (logits == threshold).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("broken", "num_broken"), [(torch.nan, 1), (torch.nan, 300), (torch.inf, 2), (-torch.inf, 300)]
)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (5, 0.9)])
def test_rows_without_a_mass_come_to_an_end(device, broken, num_broken, top_k, top_p):
    from hornbeam.ops.sample.triton import BACKEND

    logits, *inputs = draw(device, 2, 300)
    inputs[2] = ones = torch.ones_like(inputs[2])  # temperatures
    limits = Limits(top_ks=torch.full_like(inputs[3], top_k), top_ps=ones * top_p, min_ps=ones * 0)
    expected = BACKEND.sample(logits, *inputs, limits).tolist()
    logits[0, :num_broken] = broken
    ids = BACKEND.sample(logits, *inputs, limits).tolist()
    assert 0 <= ids[0] < 300
    assert ids[1] == expected[1]


@pytest.mark.parametrize("room", [16, 1024])
def test_thresholds_of_long_rows(device, room, monkeypatch):
    """Of a few tokens, and of most, for which the interval is estimated; it may hold more than there is room for."""
    from hornbeam.ops.sample import triton_survey, triton_thresholds

    monkeypatch.setattr(triton_thresholds, "_ENOUGH", 8)
    monkeypatch.setattr(triton_thresholds, "_ROOM", room)
    monkeypatch.setattr(triton_survey, "_PROGRAMS", 8)
    top_ps = torch.tensor([1.0, 1.0, 0.95, 0.5, 0.95], device=device)
    top_ks = torch.tensor([3, 2000, 0, 0, 0], device=device)
    spread = torch.tensor([1.0, 2.0, 0.5, 0.5, 6.0], device=device)
    logits = torch.randn(5, 20000, device=device) * spread.unsqueeze(1)
    slots, temperatures = torch.arange(5, device=device), torch.full((5,), 0.8, device=device)
    limits = Limits(top_ks=top_ks, top_ps=top_ps, min_ps=torch.zeros_like(top_ps))
    lowest, _ = triton_thresholds.find_thresholds(logits, slots, temperatures, limits)
    for row in range(2):
        assert lowest[row] == logits[row].topk(int(top_ks[row])).values[-1]
    for row in range(2, 5):
        assert_is_top_p(logits[row], lowest[row], float(top_ps[row]), 0.8)
    alone, _ = triton_thresholds.find_thresholds(logits[3:4], slots[3:4], temperatures, limits)
    assert alone[0] == lowest[3]


def test_what_is_below_the_threshold_is_never_chosen(device, dtype):
    from hornbeam.ops.sample.triton import BACKEND

    inputs, limits = draw(device, 8, 5000, dtype), draw_limits(device, 11)
    ids = BACKEND.sample(*inputs, limits)
    assert ids.tolist() == ReferenceSample().sample(*inputs, limits).tolist()
    logits, slots, _, temperatures, *_ = inputs
    thresholds = ReferenceSample().thresholds(logits, slots, temperatures, limits)
    assert (logits.float().gather(1, ids.unsqueeze(1)).squeeze(1) >= thresholds - 1e-5).all()


def test_penalties_equal_the_references(device, dtype):
    from hornbeam.ops.sample.triton import BACKEND

    logits, *_ = draw(device, 4, 5000, dtype)
    slots = torch.tensor([3, 0, 5, 1], device=device)
    counts = torch.randint(0, 8, (6, 5000), device=device, dtype=torch.int32)
    penalties = [torch.rand(4, device=device) + 0.5 for _ in range(3)]
    expected = ReferenceSample().penalize(logits, slots, counts, *penalties)
    torch.testing.assert_close(BACKEND.penalize(logits, slots, counts, *penalties), expected)


@pytest.mark.parametrize(("vocab_size", "num_top"), [(7, 7), (5000, 0), (5000, 20)])
def test_logprobs_equal_the_references(device, dtype, vocab_size, num_top):
    """Of tokens whose logits are equal, those with the lowest ids come first."""
    from hornbeam.ops.sample.triton import BACKEND

    logits, *_ = draw(device, 3, vocab_size, dtype)
    logits[1] = 1.5
    ids = torch.randint(0, vocab_size, (3, 40), device=device)
    of_ids, top_ids, top = BACKEND.logprobs(logits, ids, num_top)
    expected, _, expected_top = ReferenceSample().logprobs(logits, ids, num_top)
    torch.testing.assert_close((of_ids, top), (expected, expected_top), atol=1e-5, rtol=1e-5)
    in_order = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    assert top_ids.tolist() == in_order.tolist()
