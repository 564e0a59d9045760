"""Sizes of the cache pool."""

import pytest
import torch

from hornbeam.cache.pool import CachePool, page_bytes, pages_that_fit
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError

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
    assert page_bytes(SPECS, 16) == 16 * (2 * 2 * 16 * 2 + 4 * 4)


def test_a_budget_too_small_is_refused_with_the_numbers() -> None:
    size = page_bytes(SPECS, 16)
    assert pages_that_fit(10 * size + 1, SPECS, 16) == 10
    with pytest.raises(ConfigError, match=r"0 MiB are left.*--mem-fraction-static"):
        pages_that_fit(2 * size - 1, SPECS, 16)
    with pytest.raises(ConfigError):
        pages_that_fit(-5, SPECS, 16)
