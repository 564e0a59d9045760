"""Records and their replay; every random program is replayed, too (test_programs.py)."""

import msgspec
import pytest
from scheduler.simulation import Simulation, make, tokens_of

from hornbeam.core.errors import BadRequest
from hornbeam.scheduler.record import Made, Planned, Submitted, read_record, replay

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "dfs-weight", "random"])
def test_a_record_has_a_line_per_call_and_replays_to_the_same_plans(policy: str) -> None:
    simulation = Simulation(policy=policy, num_pages=30, waiting_timeout=5.0)
    simulation.submit(*(make(f"r{i}", tokens_of(i % 3, 20 + i), 9, seed=None) for i in range(9)))
    with pytest.raises(BadRequest):
        simulation.submit(make("empty", ()))
    for now in range(5):
        simulation.scheduler.expire(float(now))
        simulation.step()
    simulation.scheduler.pause("retract")
    simulation.scheduler.abort("r3")
    simulation.scheduler.resume()
    simulation.run()
    simulation.replay()
    entries = list(read_record(simulation.record.getvalue().splitlines()))
    assert isinstance(entries[0], Made)
    assert sum(isinstance(entry, Submitted) for entry in entries) == 10
    assert [entry.plan for entry in entries if isinstance(entry, Planned) and entry.plan] == simulation.plans


def test_another_decision_is_found() -> None:
    simulation = Simulation()
    simulation.submit(make("a", tokens_of(1, 20), 3), make("b", tokens_of(2, 20), 3))
    simulation.run()
    entries = list(read_record(simulation.record.getvalue().splitlines()))
    index = next(index for index, entry in enumerate(entries) if isinstance(entry, Submitted))
    entries[index] = Submitted(make("a", tokens_of(1, 19), 3), 0.0)
    with pytest.raises(AssertionError, match="planned StepPlan"):
        replay(entries)


def test_a_line_that_is_no_entry_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        list(read_record([b'{"type": "Nonsense"}']))
