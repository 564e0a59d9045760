"""Mixtral against transformers, on tiny random checkpoints in float32."""

from pathlib import Path

import pytest
from family_parity import assert_every_expert_agrees, assert_parity, reference, save_checkpoint

pytestmark = pytest.mark.cpu

EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}


@pytest.mark.parametrize("window", [None, 24])
def test_logprobs_equal_the_reference(tmp_path: Path, window: int | None) -> None:
    folder = save_checkpoint(tmp_path, "mixtral", EXPERTS | {"sliding_window": window})
    assert_parity(folder, reference(folder))


def test_every_weight_matters(tmp_path: Path) -> None:
    assert_every_expert_agrees(save_checkpoint(tmp_path, "mixtral", EXPERTS))
