"""A model whose products are rounded: near itself in float32, without float32's weights in memory."""

from pathlib import Path

import pytest
import torch
from harness import Sequence, as_tensor, make_engine

from hornbeam.layers.derived import refresh_derived
from hornbeam.layers.linear import Linear

pytestmark = pytest.mark.cpu
PROMPT = list(range(3, 40))
NEEDS_BF16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs AVX512-BF16")
every_encoding = pytest.mark.parametrize("encoding", ["w8a8_int8", pytest.param("bf16", marks=NEEDS_BF16)])


@every_encoding
def test_is_near_float32(tiny_checkpoint: Path, encoding: str) -> None:
    exact, rounded = (
        as_tensor(Sequence(make_engine(tiny_checkpoint, **flags).executor, 0, 1, 4).prefill(PROMPT))
        for flags in ({}, {"quantization": encoding})
    )
    assert not exact.equal(rounded)
    assert (exact.exp() * (exact - rounded)).sum() < 0.01


@every_encoding
def test_weights_are_kept_once(tiny_checkpoint: Path, encoding: str) -> None:
    model = make_engine(tiny_checkpoint, quantization=encoding).executor._runner.model
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert linears
    assert all(linear.weight.is_meta for linear in linears)
    before = model.head(torch.ones(1, model.embed.weight.shape[1]))
    refresh_derived(model)
    assert model.head(torch.ones(1, model.embed.weight.shape[1])).equal(before)
