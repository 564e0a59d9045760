"""Norm, rotation and cache write in plain torch, one after the other."""

import torch
from torch import Tensor

from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.query import OpQuery


class ReferenceQkv:
    """Serves every device and shape."""

    def supports(self, query: OpQuery) -> str | None:
        """Always."""
        return None

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
                x.copy_(ReferenceNorm().rms_norm(x, weight, norms.eps))
        if rotation is not None:
            _rotate((q, k), rotation)
        k_pages.flatten(0, 1)[rows] = k
        v_pages.flatten(0, 1)[rows] = v


def _rotate(heads: tuple[Tensor, ...], rotation: Rotation) -> None:
    cos, sin = rotation.table[rotation.positions].unsqueeze(1).chunk(2, -1)
    for x in heads:
        rotated = x[..., : rotation.table.shape[1]]
        first, second = rotated.float().chunk(2, -1)
        rotated.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))


BACKEND = ReferenceQkv()
