"""What is chosen for products when the user names nothing."""

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.ops.linear.contract import GROUPED_LINEAR
from hornbeam.ops.query import OpQuery
from hornbeam.quant.choice import choose_quantization

pytestmark = pytest.mark.cpu
QUERY = OpQuery(device="cpu", dtype="float32", num_heads=4, num_kv_heads=2, head_dim=16, page_size=16)
CUDA = OpQuery(device="cuda", dtype="bfloat16", num_heads=4, num_kv_heads=2, head_dim=16, page_size=16)


def test_floats_stay_floats() -> None:
    assert choose_quantization("auto", QUERY, quantized=False).packing is None
    assert choose_quantization("auto", CUDA, quantized=True).packing is None
    assert choose_quantization("unquant", QUERY, quantized=True).packing is None


def test_integers_stay_integers_where_that_is_fast() -> None:
    fast = GROUPED_LINEAR.load("native").supports(QUERY) is None
    chosen = choose_quantization("auto", QUERY, quantized=True)
    assert chosen.name == ("grouped_int8" if fast else "unquant")
    assert (chosen.packing is not None) is fast


def test_what_is_asked_for_runs_or_is_refused() -> None:
    assert choose_quantization("grouped_int8", QUERY, quantized=False).packing is not None
    with pytest.raises(ConfigError, match="grouped_int8: needs a CPU"):
        choose_quantization("grouped_int8", CUDA, quantized=False)
