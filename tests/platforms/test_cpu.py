"""The CPU platform: steps in order, on a thread of their own; errors come with the result."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from hornbeam.platforms.cpu import ENTRY

pytestmark = pytest.mark.cpu


def test_work_runs_in_order_on_another_thread() -> None:
    platform = ENTRY.create()
    seen: list[tuple[int, int]] = []

    def work(number: int) -> Callable[[], int]:
        time.sleep(0.02 if number == 0 else 0)
        seen.append((number, threading.get_ident()))
        return lambda: number * 10

    pending = [platform.submit(lambda n=n: work(n)) for n in range(3)]  # type: ignore[misc]
    assert [step.result() for step in pending] == [0, 10, 20]
    assert [number for number, _ in seen] == [0, 1, 2]
    assert threading.get_ident() not in {thread for _, thread in seen}


def test_waiting_ends_after_its_time() -> None:
    gate = threading.Event()
    platform = ENTRY.create()
    pending = platform.submit(lambda: (gate.wait(), lambda: "done")[1])
    assert not pending.wait(0.01)
    gate.set()
    assert pending.wait(5)
    assert pending.result() == "done"


def test_an_error_is_raised_by_the_result_and_later_work_still_runs() -> None:
    def fail() -> Callable[[], int]:
        raise OSError("no")

    platform = ENTRY.create()
    failed, fine = platform.submit(fail), platform.submit(lambda: lambda: 1)
    assert failed.wait(5)
    with pytest.raises(OSError, match="no"):
        failed.result()
    assert fine.result() == 1


def test_memory_and_upload() -> None:
    platform = ENTRY.create()
    free, total = platform.free_memory()
    assert 0 < free <= total
    tensor = torch.ones(3)
    assert platform.upload(tensor, lane=0) is tensor
