"""Hornbeam, an LLM serving engine. `Engine` runs a model in this process; `hornbeam serve` runs a server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hornbeam.serve.python import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Engine` on first use, so that the server process and the command line stay light."""
    if name != "Engine":
        raise AttributeError(f"module 'hornbeam' has no attribute {name!r}")
    from hornbeam.serve.python import Engine

    return Engine
