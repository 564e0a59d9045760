"""Compiling ahead: Triton's kernels side by side, before anything waits for one of them.

A launch compiles its kernel and waits, so that a model's first step takes as long as all its kernels together. Most of
a compiler's time is spent without Python's lock: threads are enough. But for the rest of it they take turns, so that
of many at once all take long, and whatever else runs in Python.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_AT_ONCE = 8  # of the kernels that one has asked for; those of others want to be compiled, too
_HOOK = threading.Lock()  # for whoever has the one that Triton offers


def side_by_side(jobs: Sequence[Callable[[], T]], device: torch.device, at_once: int | None = None) -> list[T]:
    """What the jobs return: in threads on a GPU, where most of their time goes to compilers. at_once: None for all.

    Raises:
        Exception: what the first job in order to fail raises.
    """
    if device.type != "cuda":
        return [job() for job in jobs]
    torch.cuda.synchronize()  # sets the device up, once; in a thread, that makes its context current
    identify_compiler()
    with ThreadPoolExecutor(at_once or max(len(jobs), 1), initializer=torch.cuda.synchronize) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def identify_compiler() -> None:
    """Let Triton hash itself, once: threads that ask for it at the same time would all read its 400 MB."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # there is none, or it stands elsewhere
        return
    triton_key()


class WithheldLaunches:
    """Kernels that were asked for while launches were withheld, each once; on a CPU there are none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loads: dict[tuple[str, str, str], Callable[[], None]] = {}  # by module, name and what it is compiled for

    @contextmanager
    def withhold(self) -> Iterator[None]:
        """Inside, this thread's launches of kernels that are not compiled yet do nothing.

        What they would have written stays as it was, so nothing may run there that depends on it.
        """
        try:
            from triton import knobs
        except ImportError:
            knobs = None
        if knobs is None or self._device.type != "cuda":
            yield
            return
        thread = threading.get_ident()

        def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
            withheld = threading.get_ident() == thread
            if withheld:
                self._loads[fn.module, fn.name, key] = partial(_load, fn.jit_function, compile["specialization_data"])
            return withheld

        with _HOOK:
            others, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
            try:
                yield
            finally:
                knobs.runtime.jit_cache_hook = others

    def rehearse(self, run: Callable[[], object]) -> None:
        """Go through `run` without anything of it reaching the device: it is recorded as a graph and dropped.

        Nothing that it makes may outlive it, as it would never be filled. The current stream must be none of default.
        """
        if self._device.type != "cuda":
            return
        torch.cuda.current_blas_handle()  # with its workspace, which is to stay
        graph = torch.cuda.CUDAGraph()
        with self.withhold():
            graph.capture_begin(capture_error_mode="relaxed")  # libraries may set themselves up meanwhile
            try:
                run()
            finally:
                graph.capture_end()
        del graph
        torch.cuda.empty_cache()  # of the graph's own memory, which would count as taken

    def compile(self) -> None:
        """All of them side by side; launches then find them."""
        side_by_side(list(self._loads.values()), self._device, _AT_ONCE)


def _load(function: Any, specialization: str) -> None:
    """Compile a kernel, or find it on disk, and load it with its launcher."""
    launcher = function.preload(specialization).run
    assert launcher is not None
