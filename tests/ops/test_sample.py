import random

import pytest
import torch

pytest.importorskip("triton")

from hornbeam.ops.sample.reference import ReferenceSample


def draw(device, num_rows, vocab_size, dtype=torch.float32):
    logits = (torch.randn(num_rows, vocab_size, device=device) * 3).to(dtype)
    temperatures = torch.tensor([0.0, 0.8, 1.0, 1.7], device=device).repeat(num_rows)[:num_rows]
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=device)
    positions = torch.randint(0, 2**17, (num_rows,), device=device)
    return logits, temperatures, seeds, positions


@pytest.mark.parametrize("vocab_size", [7, 4096, 49152])
def test_ids_equal_the_references(device, dtype, vocab_size):
    from hornbeam.ops.sample.triton import BACKEND

    inputs = draw(device, 8, vocab_size, dtype)
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
    zeros = torch.zeros(4, dtype=torch.int64, device=device)
    ids = BACKEND.sample(logits, temperatures, zeros, zeros).tolist()
    assert ids[:3] == [77, 5000, 0]
    assert 0 <= ids[3] < 9000


def draw_filters(device, num_rows):
    generator = random.Random(0)
    rows = [
        (generator.choice([0, 0, 1, 2, 5, 40, 10**6]), generator.choice([1.0, 1e-6, 0.3, 0.9, 0.999]))
        for _ in range(num_rows)
    ]
    top_ks = torch.tensor([top_k for top_k, _ in rows], device=device)
    top_ps = torch.tensor([top_p for _, top_p in rows], device=device)
    min_ps = torch.tensor([0.0, 0.0, 0.1, 1.0], device=device).repeat(num_rows)[:num_rows]
    return top_ks, top_ps, min_ps


@pytest.mark.parametrize("vocab_size", [7, 300, 5000])
def test_thresholds_equal_the_references(device, dtype, vocab_size):
    """Rounded logits have many ties; float32 ones nearly none."""
    from hornbeam.ops.sample.triton import BACKEND

    logits, temperatures, *_ = draw(device, 16, vocab_size, dtype)
    logits[3] = 1.5  # all alike
    logits[5, ::2] = -torch.inf
    filters = draw_filters(device, 16)
    expected = ReferenceSample().thresholds(logits, temperatures, *filters)
    torch.testing.assert_close(BACKEND.thresholds(logits, temperatures, *filters), expected, atol=1e-5, rtol=1e-6)


def test_what_is_below_the_threshold_is_never_chosen(device, dtype):
    from hornbeam.ops.sample.triton import BACKEND

    inputs = draw(device, 8, 5000, dtype)
    thresholds = inputs[0].float().amax(1) - 3
    ids = BACKEND.sample(*inputs, thresholds)
    assert ids.tolist() == ReferenceSample().sample(*inputs, thresholds).tolist()
    assert (inputs[0].float().gather(1, ids.unsqueeze(1)).squeeze(1) >= thresholds).all()


def test_penalties_equal_the_references(device, dtype):
    from hornbeam.ops.sample.triton import BACKEND

    logits, *_ = draw(device, 4, 5000, dtype)
    slots = torch.tensor([3, 0, 5, 1], device=device)
    counts = torch.randint(0, 8, (6, 5000), device=device, dtype=torch.int32)
    penalties = [torch.rand(4, device=device) + 0.5 for _ in range(3)]
    expected = ReferenceSample().penalize(logits, slots, counts, *penalties)
    torch.testing.assert_close(BACKEND.penalize(logits, slots, counts, *penalties), expected)
