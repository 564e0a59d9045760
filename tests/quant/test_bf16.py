"""Products in bfloat16: near the exact ones, whatever the number of rows, and only where the CPU has them."""

import pytest
import torch

from hornbeam.core.errors import ConfigError
from hornbeam.ops.query import OpQuery
from hornbeam.quant.bf16 import QUANTIZATION, Bf16Weight
from hornbeam.quant.contract import QUANTIZATIONS

pytestmark = pytest.mark.cpu
QUERY = OpQuery(device="cpu", dtype="float32", num_heads=4, num_kv_heads=2, head_dim=8, page_size=16)
needs_bf16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs AVX512-BF16")


@needs_bf16
@pytest.mark.parametrize("num_rows", [0, 1, 2, 70])
@pytest.mark.parametrize(("num_in", "num_out", "bias"), [(64, 96, False), (70, 33, True)])
def test_is_near_the_exact_product(num_rows: int, num_in: int, num_out: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, num_in), torch.randn(num_out, num_in)
    offset = torch.randn(num_out) if bias else None
    actual = QUANTIZATION.create(QUERY).pack(weight).linear(x, offset)
    exact = torch.nn.functional.linear(x, weight, offset)
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    assert (actual - exact).abs().sum() <= 0.01 * exact.abs().sum()


@needs_bf16
def test_a_precise_weight_is_not_rounded_to_eight_bits() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64), torch.randn(96, 64)
    packed = QUANTIZATION.create(QUERY).pack(weight, precise=True)
    exact = x @ weight.T
    assert not isinstance(packed, Bf16Weight)
    assert (packed.linear(x, None) - exact).abs().sum() <= 0.0005 * exact.abs().sum()


def test_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="AVX512-BF16"):
        QUANTIZATIONS.choose(QUERY, "bf16")
