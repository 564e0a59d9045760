import numpy as np
import pytest
import torch

from hornbeam.core.errors import ConfigError
from hornbeam.quant.gguf import dequantize

gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.cpu

SHAPE = (7, 96)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_equals_the_gguf_package(type_name: str) -> None:
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    quant_type = gguf.GGMLQuantizationType[type_name]
    data = gguf.quants.quantize(values, quant_type)
    expected = gguf.quants.dequantize(data, quant_type)
    flat = np.frombuffer(data.tobytes(), dtype=np.uint8)  # read-only, as a mapped file is
    got = dequantize(flat, type_name, SHAPE)
    assert got.dtype == torch.float32
    assert got.shape == SHAPE
    np.testing.assert_array_equal(got.numpy(), expected)


def test_an_unsupported_type_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"Q6_K.*Q8_0"):
        dequantize(np.zeros(210, dtype=np.uint8), "Q6_K", (1, 256))
