"""Norm, rotation and cache write on a CPU: the halves of heads are turned without copies of whole heads."""

from torch import Tensor

from hornbeam.ops.device import needs_cpu
from hornbeam.ops.norm.cpu import CpuNorm
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.query import OpQuery


class CpuQkv:
    """See `Qkv`."""

    def supports(self, query: OpQuery) -> str | None:
        """CPUs in float32."""
        return needs_cpu(query) if query.dtype == "float32" else "needs float32"

    def store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms | None,
        rotation: Rotation | None,
        k_pages: Tensor,
        v_pages: Tensor,
        rows: Tensor,
    ) -> None:
        """See `Qkv`."""
        if norms is not None:
            for x, weight in ((q, norms.query), (k, norms.key)):
                x.copy_(CpuNorm().rms_norm(x, weight, norms.eps))
        if rotation is not None:
            half = rotation.table.shape[1] // 2
            turns = rotation.table.index_select(0, rotation.positions).unsqueeze(1)
            cos, sin = turns[..., :half], turns[..., half:]
            for x in (q, k):
                _rotate(x[..., :half], x[..., half : 2 * half], cos, sin)
        k_pages.flatten(0, 1).index_copy_(0, rows, k)
        v_pages.flatten(0, 1).index_copy_(0, rows, v)


def _rotate(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Both halves of heads [T, H, R/2], in place."""
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(turned)


BACKEND = CpuQkv()
