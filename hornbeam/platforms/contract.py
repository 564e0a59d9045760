"""What the executor needs of a device: memory, an ordered queue of work, staging, and graphs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from hornbeam.core.platform import PlatformFacts

T = TypeVar("T", covariant=True)
MemoryTag = Literal["weights", "steps", "kv", "graphs"]  # steps: buffers and activations of the largest one


class Pending(Protocol[T]):
    """Work under way on the device."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block until done, or until `timeout` seconds have passed where the device allows it. Whether it is done."""

    def result(self) -> T:
        """Block until done; the result, or the exception that the work raised."""


class Capture(Protocol):
    """How graphs are made."""

    def __call__(self, run: Callable[[], Tensor], *, known: bool = False) -> Callable[[], Tensor]:
        """See `Platform.capture`."""


class Platform(Protocol):
    """One kind of device. Work submitted to it runs in order."""

    device: torch.device

    def facts(self) -> PlatformFacts:
        """What the machine is and prefers."""

    def free_memory(self) -> tuple[int, int]:
        """Bytes free and bytes in all, on the device."""

    def tagged(self, tag: MemoryTag) -> AbstractContextManager[None]:
        """What is allocated inside is of this kind: told in the log, so that every GiB has a name."""

    def submit(self, work: Callable[[], Callable[[], T]]) -> Pending[T]:
        """Start `work`; when all it enqueued is done, the callable it returned makes the result on the host."""

    def upload(self, host: Tensor, lane: int) -> Tensor:
        """A CPU tensor as one that the device reads, without waiting; valid until the lane's next upload.

        For what is read once or twice: it may be read across the bus. The lane's step before must be done.
        """

    def capture(self, run: Callable[[], Tensor], *, known: bool = False) -> Callable[[], Tensor]:
        """Record `run` as a graph; asks facts().graphs. The result replays it.

        Its output lies at the same place each time, and is valid until any graph is replayed.

        known: its like has been recorded already, so that nothing is left to be loaded.
        """
