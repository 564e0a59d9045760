"""The scheduler's benchmark, on small numbers; and that its costs stay what they are, with room for slow machines."""

import json

import pytest

from hornbeam.bench import scheduler

pytestmark = pytest.mark.pure


def test_it_prints_a_table_and_a_json_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "BATCH_SIZES", (8, 256))
    monkeypatch.setattr(scheduler, "NUM_NODES", (100, 1000))
    monkeypatch.setattr(scheduler, "REPEATS", 20)
    lines = list(scheduler.run_scheduler_benchmark())
    numbers = json.loads(lines[-1])
    assert 0 < numbers["decode_step_ms"]["256"] < 3
    assert 0 < numbers["match_ms"]["1000"] < 5
    assert len(lines) == 7
