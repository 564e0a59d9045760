"""Sizes of the cache pool."""

import pytest
import torch

from hornbeam.cache.pool import CachePool, page_bytes
from hornbeam.core.cache_spec import CacheSpec

pytestmark = pytest.mark.cpu

SPECS = (
    CacheSpec(kind="full", layers=(0, 2), row_shapes=((2, 8), (2, 8)), dtype="bfloat16"),
    CacheSpec(kind="full", layers=(1,), row_shapes=((4,),), dtype="float32"),
)


def test_each_layer_finds_its_pages_and_group() -> None:
    pool = CachePool(SPECS, (5, 3), 16, torch.device("cpu"))
    group, (k, v) = pool.layer(2)
    assert group == 0
    assert k.shape == v.shape == (5, 16, 2, 8)
    assert k.dtype == torch.bfloat16
    group, (latent,) = pool.layer(1)
    assert group == 1
    assert latent.shape == (3, 16, 4)


def test_a_page_takes_what_its_tensors_take() -> None:
    assert [page_bytes(spec, 16) for spec in SPECS] == [16 * 2 * 2 * 16 * 2, 16 * 4 * 4]
