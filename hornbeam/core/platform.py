"""What a device kind prefers and can do, as data that configuration can weigh without importing torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformFacts:
    """Measured or known facts of the machine at hand, and the defaults they lead to."""

    name: str  # "cpu", "cuda"
    device: str  # for people: "NVIDIA H200, 140 GiB" or "CPU, 2 threads"
    dtype: str | None  # None: the checkpoint's own
    page_size: int
    chunked_prefill_size: int
    max_running_requests: int
    memory_fraction: float  # of `Platform.free_memory`'s total
    graphs: bool
