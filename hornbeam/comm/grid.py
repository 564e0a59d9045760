"""The process grid: how many ranks share each kind of work, and which one this is. Passed around, never global.

Only the single-process grid runs today. Layers already ask the grid for their share, so that collectives have one
place to arrive.
"""

from dataclasses import dataclass

from hornbeam.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One way of splitting work: `size` ranks, of which this process is number `rank`."""

    size: int = 1
    rank: int = 0

    def share(self, total: int, what: str) -> int:
        """This rank's part of `total`. Raises ConfigError if it does not divide evenly."""
        if total % self.size:
            raise ConfigError(f"{total} {what} do not divide over {self.size} ranks")
        return total // self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Attention heads over `attn_tp`, requests over `attn_dp`, experts over `moe_tp` and `moe_ep`, layers over `pp`."""

    attn_tp: Axis = Axis()
    attn_dp: Axis = Axis()
    moe_tp: Axis = Axis()
    moe_ep: Axis = Axis()
    pp: Axis = Axis()

    def __post_init__(self) -> None:
        if any(axis.size != 1 for axis in (self.attn_tp, self.attn_dp, self.moe_tp, self.moe_ep, self.pp)):
            raise ConfigError("only one process is supported so far: every axis of the grid must have size 1")
