"""Who is next: policies, priorities and preemption; and what is kept free for tokens to come."""

import pytest
from scheduler.simulation import Simulation, check_outputs, make, tokens_of

from hornbeam.core.errors import Overloaded
from hornbeam.core.request import Request
from hornbeam.scheduler.policies import POLICIES
from hornbeam.scheduler.waiting import FAIR_SHARE, FIRST_COME, RANDOM

pytestmark = pytest.mark.pure


def served(simulation: Simulation, *requests: Request) -> list[str]:
    """The ids in the order of their ends; all are there before the first step."""
    simulation.submit(*requests)
    simulation.run()
    check_outputs(simulation, list(requests))
    return list(simulation.ends)


@pytest.mark.parametrize("policy", [FIRST_COME, *POLICIES, RANDOM])
def test_every_policy_serves_all_and_overtakes_within_bounds(policy: str) -> None:
    simulation = Simulation(policy=policy, slots=1, num_pages=4000, chunk=512)
    requests = [make(str(i), tokens_of(i % 7, 8 + i % 5), 1 + i % 3, ignore_eos=True) for i in range(600)]
    order = [int(rid) for rid in served(simulation, *requests)]
    assert sorted(order) == list(range(600))
    assert (order == sorted(order)) == (policy in ("fcfs", "routing-key"))  # nobody has a key
    for place, arrival in enumerate(order):
        assert place <= (arrival + 600) // 2 + 64


def test_longest_prefix_first_groups_requests_that_share() -> None:
    simulation = Simulation(policy="lpm", slots=1, page_size=1)
    shared = tokens_of(1, 30)
    simulation.submit(make("seen", shared, 1))
    while simulation.scheduler.has_work:
        simulation.step()
    requests = [make(f"{kind}{i}", (*prompt, 5 + i), 1) for i in range(3) for kind, prompt in PROMPTS.items()]
    requests.append(make("hit", (*shared, 9), 1))
    order = served(simulation, *requests)
    assert order[:2] == ["seen", "hit"]
    assert "".join(rid[0] for rid in order[2:]) in ("aaabbb", "bbbaaa")


PROMPTS = {"a": tokens_of(2, 20), "b": tokens_of(3, 20)}


def test_the_heaviest_branch_goes_first() -> None:
    simulation = Simulation(policy="dfs-weight", slots=1, page_size=1)
    served_before = [make(f"seen{kind}", prompt, 1) for kind, prompt in PROMPTS.items()]
    simulation.submit(*served_before)
    while simulation.scheduler.has_work:
        simulation.step()
    simulation.submit(make("a1", (*PROMPTS["a"], 1), 1), make("b1", (*PROMPTS["b"], 1), 1))
    simulation.submit(make("b2", (*PROMPTS["b"], 2), 1), make("cold", tokens_of(9, 9), 1))
    simulation.run()
    assert list(simulation.ends)[2:] == ["b1", "b2", "a1", "cold"]


def test_longest_output_first() -> None:
    requests = [make(str(new), tokens_of(new, 5), new, ignore_eos=True) for new in (3, 9, 6)]
    assert served(Simulation(policy="lof", slots=1), *requests) == ["9", "6", "3"]


@pytest.mark.parametrize("low_first", [False, True])
def test_higher_priorities_go_first_and_equals_by_arrival(low_first: bool) -> None:
    simulation = Simulation(priorities=True, low_priority_first=low_first, slots=1)
    requests = [make(f"{p}{i}", tokens_of(p, 5), 3, priority=-p if low_first else p) for i in "ab" for p in (1, 3, 2)]
    assert served(simulation, *requests) == ["3a", "3b", "2a", "2b", "1a", "1b"]


@pytest.mark.parametrize(("gap", "first"), [(5, "high"), (6, "low"), (None, "low")])
def test_a_running_request_gives_way_to_a_much_higher_priority(gap: int | None, first: str) -> None:
    simulation = Simulation(priorities=True, preemption_gap=gap, slots=1)
    requests = [make("low", tokens_of(1, 9), 30, ignore_eos=True), make("high", tokens_of(2, 9), 5, priority=5)]
    simulation.submit(requests[0])
    for _ in range(5):
        simulation.step()
    simulation.submit(requests[1])
    simulation.run()
    check_outputs(simulation, requests)
    assert next(iter(simulation.ends)) == first
    assert simulation.ends["low"].num_retractions == (first == "high")


def test_in_a_full_queue_a_better_request_takes_the_place_of_the_worst() -> None:
    simulation = Simulation(priorities=True, queue=1, slots=1)
    simulation.submit(make("a", (1,), 1, priority=1), make("b", (2,), 1))
    simulation.submit(make("c", (3,), 1, priority=2))
    with pytest.raises(Overloaded, match="full"):
        simulation.submit(make("d", (4,), 1, priority=1))
    simulation.run()
    assert simulation.ends["b"].finish.status == 503
    check_outputs(simulation, [make("a", (1,), 1), make("c", (3,), 1)])


def test_admission_learns_how_long_outputs_are() -> None:
    """At first short outputs are expected; later as many run as will fit, and few are retracted."""
    simulation = Simulation(num_pages=200, slots=50, page_size=1)
    counts = []
    for round_ in range(12):
        before = simulation.scheduler.stats().total_retractions
        requests = [make(f"{round_}.{i}", tokens_of(100 * round_ + i, 2), 90, ignore_eos=True) for i in range(10)]
        simulation.submit(*requests)
        while simulation.scheduler.has_work:
            simulation.step()
        counts.append(simulation.scheduler.stats().total_retractions - before)
    assert counts[-1] < counts[0]
    cautious = Simulation(num_pages=200, slots=50, page_size=1, conservativeness=2.0)
    cautious.submit(*(make(f"{i}", tokens_of(i, 2), 90, ignore_eos=True) for i in range(10)))
    cautious.run()
    assert cautious.scheduler.stats().total_retractions == 0


def test_routing_keys_that_run_go_first() -> None:
    simulation = Simulation(policy="routing-key", slots=3)
    keys = {"a": "x", "b": "y", "c": "y", "d": None, "e": "x", "f": "y", "g": None}
    requests = [make(rid, tokens_of(ord(rid), 5), 9, routing_key=key, ignore_eos=True) for rid, key in keys.items()]
    simulation.submit(requests[0])
    simulation.step()
    assert served(simulation, *requests[1:]) == ["a", "e", "b", "c", "f", "d", "g"]


@pytest.mark.parametrize("policy", ["fcfs", "lof"])
def test_steady_higher_priorities_starve_nobody(policy: str) -> None:
    """A request of low priority is overtaken by a bounded number, and once it runs nobody takes its place."""
    simulation = Simulation(policy=policy, priorities=True, preemption_gap=1, slots=2, num_pages=60)
    simulation.submit(make("low", tokens_of(1, 9), 40, ignore_eos=True))
    num_others = 0
    while "low" not in simulation.ends:
        if simulation.scheduler.num_waiting < 3:
            simulation.submit(make(str(num_others), tokens_of(num_others, 6), 2, priority=9))
            num_others += 1
        simulation.step()
    assert FAIR_SHARE - 2 <= num_others < FAIR_SHARE + 60
    simulation.run()
    simulation.replay()


def test_a_queue_of_no_length_takes_what_can_start_at_once() -> None:
    simulation = Simulation(queue=0, slots=2)
    simulation.submit(make("a", (1,), 9, ignore_eos=True), make("b", (2,), 9, ignore_eos=True))
    with pytest.raises(Overloaded, match="full"):
        simulation.submit(make("c", (3,), 9))
    simulation.step()
    with pytest.raises(Overloaded, match="full"):
        simulation.submit(make("c", (3,), 9))
    simulation.run()
    simulation.submit(make("c", (3,), 9))
    simulation.run()
