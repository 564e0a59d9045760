import pytest
import torch

from hornbeam.quant.mxfp4 import dequantize

pytestmark = pytest.mark.cpu


def test_every_nibble_and_exponents_far_apart() -> None:
    blocks = torch.arange(16, dtype=torch.uint8) * 16 + torch.arange(15, -1, -1, dtype=torch.uint8)
    scales = torch.tensor([127, 130, 1, 250], dtype=torch.uint8)
    out = dequantize(blocks.expand(1, 1, 4, 16), scales.view(1, 1, 4)).double().view(4, 16, 2)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat((values, -values))
    for row, exponent in zip(out, (0, 3, -126, 123), strict=True):
        assert row[:, 1].equal(values * 2.0**exponent)  # high halves count up, low halves down
        assert row[:, 0].equal(values.flip(0) * 2.0**exponent)
