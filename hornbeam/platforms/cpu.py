"""The CPU: steps run one after the other on a worker thread, so that the engine's loop never waits for a forward."""

import ctypes
import os
import sys
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
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


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
        _keep_freed_memory()
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

    def capture(self, run: Callable[[], Tensor], *, known: bool = False) -> Callable[[], Tensor]:
        """There are no graphs on a CPU."""
        raise AssertionError("a CPU has no graphs; facts().graphs says so")


def _keep_freed_memory() -> None:
    """Have the C library keep what is freed, up to 512 MiB, where it is glibc.

    It gives large blocks back to the system at once otherwise, and each activation of a prompt then costs page faults:
    the product of two tensors of 3 MB takes 2.1 instead of 0.2 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 512 << 20)):
            mallopt(parameter, value)


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
