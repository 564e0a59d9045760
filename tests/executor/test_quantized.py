"""A model whose products are rounded: near itself in float32, without float32's weights in memory."""

from pathlib import Path

import pytest
import torch
from harness import Sequence, as_tensor, make_engine

from hornbeam.layers.derived import refresh_derived
from hornbeam.layers.linear import Linear

pytestmark = pytest.mark.cpu
PROMPT = list(range(3, 40))


def test_is_near_float32(tiny_checkpoint: Path) -> None:
    exact, rounded = (
        as_tensor(Sequence(make_engine(tiny_checkpoint, **flags).executor, 0, 1, 4).prefill(PROMPT))
        for flags in ({}, {"quantization": "grouped_int8"})
    )
    assert not exact.equal(rounded)
    assert (exact.exp() * (exact - rounded)).sum() < 0.01


def test_weights_are_kept_once(tiny_checkpoint: Path) -> None:
    model = make_engine(tiny_checkpoint, quantization="grouped_int8").executor._runner.model
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert linears
    assert all(linear.weight.is_meta for linear in linears)
    before = model.head(torch.ones(1, model.embed.weight.shape[1]))
    refresh_derived(model)
    assert model.head(torch.ones(1, model.embed.weight.shape[1])).equal(before)
