"""Launches that are withheld are noted once each, by the thread that asked alone, and compiled together."""

import threading
from types import SimpleNamespace

import pytest
import torch

from hornbeam.ops import ahead
from hornbeam.ops.ahead import WithheldLaunches, side_by_side

knobs = pytest.importorskip("triton").knobs

pytestmark = pytest.mark.cpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Function:
    """What Triton makes of a kernel, as far as it is used."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def preload(self, specialization: str) -> SimpleNamespace:
        self.loaded.append(specialization)
        return SimpleNamespace(run=print)


def ask(function: Function, key: str) -> bool:
    """Whether Triton is kept from compiling it."""
    hook = knobs.runtime.jit_cache_hook
    fn = SimpleNamespace(module="somewhere", name="kernel", jit_function=function)
    return bool(hook and hook(key=key, repr="", fn=fn, compile={"specialization_data": f"for {key}"}, is_warmup=False))


def test_kernels_are_compiled_once_each_when_all_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "side_by_side", lambda jobs, device, at_once: [job() for job in jobs])
    function, launches = Function(), WithheldLaunches(GPU)
    for keys in ("aab", "bc"):
        with launches.withhold():
            assert all(ask(function, key) for key in keys)
    assert not function.loaded
    assert not ask(function, "d")
    launches.compile()
    assert function.loaded == ["for a", "for b", "for c"]


def test_other_threads_launch_as_ever() -> None:
    answers = []
    with WithheldLaunches(GPU).withhold():
        thread = threading.Thread(target=lambda: answers.append(ask(Function(), "a")))
        thread.start()
        thread.join()
    assert answers == [False]


def test_nothing_is_withheld_on_a_cpu() -> None:
    with WithheldLaunches(CPU).withhold():
        assert not ask(Function(), "a")


def test_an_error_ends_withholding() -> None:
    with pytest.raises(RuntimeError), WithheldLaunches(GPU).withhold():
        raise RuntimeError
    assert knobs.runtime.jit_cache_hook is None


def test_jobs_keep_their_order_and_their_errors() -> None:
    assert side_by_side([lambda: 1, lambda: 2], CPU) == [1, 2]
    assert side_by_side([], CPU) == []
    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1, lambda: 1 // 0], CPU)
