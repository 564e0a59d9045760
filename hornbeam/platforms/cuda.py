"""NVIDIA GPUs: one stream in whose order everything happens, from building the model to the last step.

Work is enqueued by the thread that submits it; nothing here waits for the device but `Pending`.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hornbeam.config.environment import read_environment
from hornbeam.core.platform import PlatformFacts
from hornbeam.platforms.contract import MemoryTag
from hornbeam.platforms.stale_locks import sweep_stale_locks

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEAST_STAGING = 64 << 10  # bytes
_POLL_SECONDS = 50e-6  # between two looks at the device: much less than a step, and cheap


class EventPending(Generic[T]):
    """Work whose end an event marks."""

    def __init__(self, event: torch.cuda.Event, finish: Callable[[], T]) -> None:
        self._event = event
        self._finish = finish

    def wait(self, timeout: float | None = None) -> bool:
        """See `Pending`."""
        if timeout is None:
            self._event.synchronize()
            return True
        deadline = time.monotonic() + timeout
        while not self._event.query():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def result(self) -> T:
        """See `Pending`."""
        self._event.synchronize()
        return self._finish()


class CudaPlatform:
    """See `Platform`. The thread that creates it has the platform's stream as its current one from then on.

    Sets torch's numerics for the whole process: float32 products in full precision (no TF32), and sums of split
    half-precision products in float32, because a rounding in between would depend on how a product was split.
    """

    def __init__(self) -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(self._stream)
        self._graph_memory: Any = torch.cuda.graph_pool_handle()
        self._staging: dict[int, _Staging] = {}  # by lane

    def facts(self) -> PlatformFacts:
        """See `Platform`."""
        properties = torch.cuda.get_device_properties(self.device)
        return PlatformFacts(
            name="cuda",
            device=f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            dtype=None,
            page_size=16,
            chunked_prefill_size=8192,
            max_running_requests=256,
            memory_fraction=0.88,
            graphs=True,
        )

    def free_memory(self) -> tuple[int, int]:
        """See `Platform`. What torch's allocator holds on to counts as taken."""
        free, total = torch.cuda.mem_get_info(self.device)
        return free, total

    @contextmanager
    def tagged(self, tag: MemoryTag) -> Iterator[None]:
        """See `Platform`."""
        before = self._settled_memory(tag)
        yield
        after = self._settled_memory(tag)
        logger.info("memory for %s = %.2f GiB (%.2f GiB are left)", tag, (before - after) / 2**30, after / 2**30)

    def _settled_memory(self, tag: MemoryTag) -> int:
        """Bytes free. What probes leave to torch's allocator, and loading and searching, is no weight: it goes back."""
        if tag == "weights":
            torch.cuda.empty_cache()
        free, _ = self.free_memory()
        return free

    def submit(self, work: Callable[[], Callable[[], T]]) -> EventPending[T]:
        """See `Platform`. What the calling thread has enqueued on another stream so far comes first."""
        current = torch.cuda.current_stream(self.device)
        if current != self._stream:
            self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            try:
                finish = work()
            except Exception as error:
                finish = _raiser(error)
            event = torch.cuda.Event()
            event.record(self._stream)
        return EventPending(event, finish)

    def upload(self, host: Tensor, lane: int) -> Tensor:
        """See `Platform`. Kernels read the host's pinned memory: a copy would keep those behind it waiting."""
        if lane not in self._staging or self._staging[lane].num_bytes < host.nbytes:
            self._staging[lane] = _Staging(1 << (max(host.nbytes, _LEAST_STAGING) - 1).bit_length(), self.device)
        return self._staging[lane].put(host)

    def capture(self, run: Callable[[], Tensor], *, known: bool = False) -> Callable[[], Tensor]:
        """See `Platform`. Graphs replay one after the other, so they share memory, that of their outputs included.

        Unless its like is known, `run` first runs as it is, so that what it compiles, loads and allocates once is not
        part of the graph.
        """
        if not known:
            run()
            self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph() would empty the allocator's caches before each capture, which takes longer than capturing.
        graph.capture_begin(pool=self._graph_memory, capture_error_mode="thread_local")
        try:
            output = run()
        finally:
            graph.capture_end()
        output = _borrowed(output)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class _Staging:
    """Pinned memory of the host that the device reads, too."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes = num_bytes
        self._host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._seen = torch.as_tensor(_Memory(self._host), device=device)
        assert self._seen.data_ptr() == self._host.data_ptr(), "one address for both"
        self._bytes = self._host.numpy()  # torch would wake its threads to copy some kilobytes

    def put(self, host: Tensor) -> Tensor:
        """A copy of the contiguous `host`, as the device sees it."""
        self._bytes[: host.nbytes] = host.view(-1).view(torch.uint8).numpy()
        return self._seen[: host.nbytes].view(host.dtype).view(host.shape)


class _Memory:
    """A tensor's memory as bytes, for whoever reads this interface; does not keep it."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that does not own it, so that the allocator gives it to the next graph, too."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)


def _raiser(error: Exception) -> Callable[[], Any]:
    def finish() -> Any:
        raise error

    return finish


class CudaEntry:
    """See `PlatformEntry`."""

    def supports(self, query: None) -> str | None:
        """A driver, and a GPU that computes in bfloat16."""
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"the GPU's compute capability is {capability[0]}.{capability[1]}, and at least 8.0 is needed"
        return None

    def create(self) -> CudaPlatform:
        """See `PlatformEntry`."""
        environment = read_environment()
        sweep_stale_locks(environment.build_caches, environment.stale_lock_seconds)
        return CudaPlatform()


ENTRY = CudaEntry()
