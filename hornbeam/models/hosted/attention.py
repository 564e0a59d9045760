"""The attention function that transformers' modules call in place of their own.

It does nothing itself: every module of a hosted model holds one `Hook` that they share, and whoever runs the model
says there what attention means for the moment.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "hornbeam"  # the name in transformers' table

# (module, q [1, Hq, T, D], k [1, Hk, T, D], v [1, Hk, T, Dv], the call's further arguments) -> [1, T, Hq, Dv]
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


class Hook:
    """What attention is, for all modules of one model."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def attach(self, model: nn.Module) -> None:
        """Be found by `model` and all modules in it."""
        for module in model.modules():
            object.__setattr__(module, "_hornbeam_hook", self)


def register() -> None:
    """Enter our function into transformers' table."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _call_hook)


def _call_hook(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """See transformers' AttentionInterface."""
    hook: Any = module._hornbeam_hook
    return hook.attend(module, query, key, value, {"attention_mask": attention_mask, **settings}), None
