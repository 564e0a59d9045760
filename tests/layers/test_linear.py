"""Weights that are kept in another encoding follow their parameters."""

import pytest
import torch

from hornbeam.comm.grid import Grid
from hornbeam.layers.context import BuildContext
from hornbeam.layers.linear import Embedding, Head
from hornbeam.ops.kernels import choose_kernels
from hornbeam.ops.linear.contract import GROUPED_LINEAR
from hornbeam.ops.query import OpQuery

pytestmark = pytest.mark.cpu


def test_a_tied_head_follows_its_table() -> None:
    query = OpQuery(device="cpu", dtype="float32", num_heads=2, num_kv_heads=1, head_dim=16, page_size=16)
    context = BuildContext(
        grid=Grid(),
        kernels=choose_kernels(query),
        dtype=torch.float32,
        device=torch.device("cpu"),
        context_len=64,
        packing=GROUPED_LINEAR.choose(query).value,
    )
    table = Embedding(40, 32, context)
    head, x = Head(40, 32, context, table), torch.ones(1, 32)
    torch.manual_seed(0)
    for _ in range(2):
        table.weight.normal_()
        head.refresh_derived()
        torch.testing.assert_close(head(x), x @ table.weight.T, rtol=0.05, atol=0.2)
