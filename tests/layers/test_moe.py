"""Gates in float32 inside models of half precision."""

import pytest
import torch
import torch.nn.functional as F

from hornbeam.comm.grid import Grid
from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.moe import WideGate
from hornbeam.layers.parameters import empty_parameter
from hornbeam.ops.kernels import choose_kernels
from hornbeam.ops.query import OpQuery

pytestmark = pytest.mark.cpu


def test_a_gate_is_narrowed_only_if_that_loses_nothing() -> None:
    """Over updates, too: the second weight has digits that the first one did not have."""
    device = torch.device("cpu")
    query = OpQuery(device="cpu", dtype="bfloat16", num_heads=2, num_kv_heads=1, head_dim=16, page_size=16)
    context = BuildContext(
        grid=Grid(), kernels=choose_kernels(query), dtype=torch.bfloat16, device=device, context_len=64
    )
    gate, fwd = WideGate(32, 8, context), Forward(num_decode=0, caches=(), groups=())
    torch.manual_seed(0)
    x, fine = torch.randn(5, 32).bfloat16(), torch.randn(8, 32)
    for weight, narrowed in ((fine.bfloat16().float(), True), (fine, False)):
        gate.weight = empty_parameter(weight.shape, context, torch.float32)
        gate.weight.copy_(weight)
        for _ in range(2):
            gate.refresh_derived()
        assert gate.weight.is_meta == narrowed
        torch.testing.assert_close(gate(x, fwd), F.linear(x.float(), weight))
