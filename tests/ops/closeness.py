"""When two results count as equal."""

import torch
from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """As torch.testing would; looser for bfloat16 on a CPU, where Triton's interpreter truncates at each rounding."""
    if actual.dtype == torch.bfloat16 and actual.device.type == "cpu":
        torch.testing.assert_close(actual, expected, rtol=4e-2, atol=1e-3 if roundings == 1 else 1e-2 * roundings)
    else:
        torch.testing.assert_close(actual, expected)
