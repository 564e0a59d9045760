"""Kernels that may be left out."""

import pytest
import torch
from torch import Tensor

from hornbeam.ops.trial import on_hopper, serves

pytestmark = pytest.mark.cpu


def broken() -> tuple[Tensor, Tensor]:
    raise ImportError("no such thing\nand much more")


@pytest.mark.parametrize(
    ("trial", "told"),
    [
        (lambda: (torch.ones(3), torch.ones(3)), None),
        (lambda: (torch.ones(3), torch.zeros(3)), "Tensor-likes are not close!"),
        (broken, "no such thing"),
    ],
)
def test_a_trial_tells_why_a_kernel_is_left_out(caplog, trial, told) -> None:
    assert serves("gates", "others serve", trial) == (told is None)
    lines = [f"the kernel in Gluon for gates is left out ({told}): others serve"] if told else []
    assert [record.getMessage() for record in caplog.records] == lines


def test_what_is_not_for_hopper() -> None:
    assert not on_hopper(torch.bfloat16, torch.device("cpu"))
