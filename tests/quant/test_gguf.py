import numpy as np
import pytest
import torch

from hornbeam.core.errors import ConfigError
from hornbeam.quant.gguf import dequantize

gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.cpu

SHAPE = (7, 96)
FLOAT16_BYTES = {
    "Q2_K": [(80, 84)],
    "Q3_K": [(108, 110)],
    "Q4_K": [(0, 4)],
    "Q5_K": [(0, 4)],
    "Q6_K": [(208, 210)],
    "IQ4_NL": [(0, 2)],
}


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
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


@pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_formats_that_the_gguf_package_only_reads(type_name: str) -> None:
    """Random bytes, whatever they encode; the blocks' float16 numbers alone are kept finite."""
    quant_type = gguf.GGMLQuantizationType[type_name]
    elements, num_bytes = gguf.GGML_QUANT_SIZES[quant_type]
    noise = np.random.default_rng(0)
    blocks = noise.integers(0, 256, (64, num_bytes), dtype=np.uint8)
    for start, end in FLOAT16_BYTES[type_name]:
        blocks[:, start:end] = noise.normal(size=(64, (end - start) // 2)).astype(np.float16).view(np.uint8)
    expected = gguf.quants.dequantize(blocks, quant_type)
    got = dequantize(blocks.reshape(-1), type_name, (64, elements))
    np.testing.assert_array_equal(got.numpy(), expected)


def test_an_unsupported_type_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"IQ2_S .*Q8_0"):
        dequantize(np.zeros(82, dtype=np.uint8), "IQ2_S", (1, 256))
