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
