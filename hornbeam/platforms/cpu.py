"""The CPU: steps run one after the other on a worker thread, so that the engine's loop never waits for a forward."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hornbeam.core.platform import PlatformFacts
from hornbeam.platforms.contract import MemoryTag

T = TypeVar("T")


class FuturePending(Generic[T]):
    """A step on the worker thread."""

    def __init__(self, future: "Future[T]") -> None:
        self._future = future

    def wait(self, timeout: float | None = None) -> bool:
        """See `Pending`."""
        return not wait((self._future,), timeout).not_done

    def result(self) -> T:
        """See `Pending`."""
        return self._future.result()


class CpuPlatform:
    """See `Platform`."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hornbeam-forward")

    def facts(self) -> PlatformFacts:
        """See `Platform`."""
        return PlatformFacts(
            name="cpu",
            device=f"CPU, {torch.get_num_threads()} threads",
            dtype="float32",
            page_size=16,
            chunked_prefill_size=512,
            max_running_requests=64,
            memory_fraction=0.4,
            graphs=False,
        )

    def free_memory(self) -> tuple[int, int]:
        """See `Platform`. What other programs hold does not count: the share is taken of what is available."""
        available = _available_memory()
        return available, available

    def tagged(self, tag: MemoryTag) -> AbstractContextManager[None]:
        """See `Platform`. Memory is taken when it is touched, so there is nothing to tell."""
        return nullcontext()

    def submit(self, work: Callable[[], Callable[[], T]]) -> FuturePending[T]:
        """See `Platform`."""
        return FuturePending(self._worker.submit(lambda: work()()))

    def upload(self, host: Tensor, lane: int) -> Tensor:
        """See `Platform`."""
        return host

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """There are no graphs on a CPU."""
        raise AssertionError("a CPU has no graphs; facts().graphs says so")


def _available_memory() -> int:
    """Bytes that can be taken without swapping, the kernel's file cache included."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class CpuEntry:
    """See `PlatformEntry`."""

    def supports(self, query: None) -> str | None:
        """There is always a CPU."""
        return None

    def create(self) -> CpuPlatform:
        """See `PlatformEntry`."""
        return CpuPlatform()


ENTRY = CpuEntry()
