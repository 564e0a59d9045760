"""The gated feed-forward layer (Shazeer, 2020)."""

from torch import Tensor, nn

from hornbeam.layers.context import BuildContext
from hornbeam.layers.forward import Forward
from hornbeam.layers.linear import Linear


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, context: BuildContext, *, bias: bool = False) -> None:
        super().__init__()
        parts = (intermediate_size, intermediate_size)
        self.gate_up = Linear(hidden_size, parts, context, bias=bias, split="out")
        self.down = Linear(intermediate_size, (hidden_size,), context, bias=bias, split="in")

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """[T, H] -> [T, H]."""
        inner = self.gate_up.gate(x, fwd)
        if inner is not None:
            return self.down(inner, fwd)
        return self.down.gated(self.gate_up(x, fwd), fwd)
