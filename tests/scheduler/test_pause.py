"""Pause and continue, and requests that wait or run for too long."""

import pytest
from scheduler.simulation import Simulation, check_outputs, make, tokens_of

pytestmark = pytest.mark.pure


def begun(depth: int, after: int) -> tuple[Simulation, list]:
    simulation = Simulation(slots=2, chunk=8, depth=depth)
    requests = [make(f"r{i}", tokens_of(i, 21), 20, seed=i, ignore_eos=True) for i in range(3)]
    simulation.submit(*requests)
    for _ in range(after):
        simulation.step()
    return simulation, requests


def settle(simulation: Simulation) -> None:
    while simulation.step():
        simulation.scheduler.check()
    simulation.scheduler.check()


@pytest.mark.parametrize("after", range(0, 24, 3))
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_after_a_pause_requests_go_on_as_if_nothing_had_been(mode: str, depth: int, after: int) -> None:
    simulation, requests = begun(depth, after)
    running = simulation.scheduler.num_running
    simulation.scheduler.pause(mode)
    settle(simulation)
    num_planned = len(simulation.plans)
    late = make("late", tokens_of(9, 5), 3)
    simulation.submit(late)
    assert not simulation.step()
    assert simulation.scheduler.num_running <= (0 if mode == "retract" else running)
    assert simulation.scheduler.flush() == (simulation.scheduler.num_running == 0)
    assert len(simulation.plans) == num_planned
    simulation.scheduler.resume()
    simulation.run()
    check_outputs(simulation, [*requests, late])


@pytest.mark.parametrize("after", range(0, 24, 3))
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_aborts_during_a_pause(mode: str, depth: int, after: int) -> None:
    simulation, requests = begun(depth, after)
    simulation.scheduler.pause(mode)
    simulation.scheduler.abort("r0")
    settle(simulation)
    simulation.scheduler.abort("r1")
    settle(simulation)
    assert {simulation.ends[rid].finish.type for rid in ("r0", "r1")} == {"abort"}
    if mode == "abort":
        assert simulation.ends["r2"].finish.type == "abort"
        assert not simulation.scheduler.has_work
    simulation.scheduler.resume()
    simulation.run()
    if mode != "abort":
        check_outputs(simulation, requests[2:])


def test_time_outs_of_waiting_and_of_running() -> None:
    simulation = Simulation(slots=1, waiting_timeout=10, running_timeout=20)
    simulation.submit(make("runs", tokens_of(1, 5), 100, ignore_eos=True), make("waits", tokens_of(2, 5), 5))
    for now in range(40):
        simulation.scheduler.expire(float(now))
        simulation.step()
        if now == 10:
            assert not simulation.ends
        if now == 11:
            assert list(simulation.ends) == ["waits"]
    finish = simulation.ends["runs"].finish
    assert (finish.status, finish.message) == (503, "the request was running for more than 20 seconds")
    assert simulation.ends["waits"].finish.message == "the request was waiting for more than 10 seconds"
    simulation.run()
