"""The grid tells each rank its share."""

import pytest

from hornbeam.comm.grid import Axis, Grid
from hornbeam.core.errors import ConfigError

pytestmark = pytest.mark.pure


def test_shares() -> None:
    assert Axis().share(7, "heads") == 7
    assert Axis(size=4, rank=1).share(32, "heads") == 8
    with pytest.raises(ConfigError, match="9 heads do not divide over 2 ranks"):
        Axis(size=2).share(9, "heads")


def test_more_ranks_are_refused_for_now() -> None:
    with pytest.raises(ConfigError, match="one process"):
        Grid(moe_ep=Axis(size=8))
