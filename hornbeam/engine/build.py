"""Makes a real engine of a user's options. Alone in `engine` and `serve` it touches torch, when it is called."""

from collections.abc import Mapping
from typing import Any

from hornbeam.engine.loop import Built


def build_engine(user: Mapping[str, Any]) -> Built:
    """The engine that the checked flags `user` describe (see `check_flags`; `model_path` is set).

    Raises:
        ConfigError: a flag, the checkpoint or the machine cannot work.
        FamilyUnavailable: the model's family cannot be used.
    """
    raise NotImplementedError
