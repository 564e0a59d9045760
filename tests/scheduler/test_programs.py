"""The scheduler under random loads and random commands, in pools that are too small."""

import math
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from scheduler.simulation import Simulation, check_logprobs, check_outputs, make, reference, tokens_of

from hornbeam.core.errors import BadRequest, Overloaded
from hornbeam.core.request import LogprobOptions, Request
from hornbeam.scheduler.policies import POLICIES
from hornbeam.scheduler.waiting import FIRST_COME, RANDOM

pytestmark = pytest.mark.pure

NUM_PROGRAMS = int(os.environ.get("HORNBEAM_TEST_PROGRAMS", "60"))  # of each kind; 500 take a few minutes
limits = settings(
    max_examples=NUM_PROGRAMS,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)


def logprob_options(num_prompt: int) -> st.SearchStrategy[LogprobOptions | None]:
    starts = st.one_of(st.none(), st.integers(0, num_prompt))
    return st.one_of(st.none(), st.builds(LogprobOptions, start=starts))


@limits
@given(data=st.data())
def test_random_loads_in_random_small_pools(data: st.DataObject) -> None:
    """Pools that hold about one request, so that nearly every load is retracted, evicted and computed again."""
    page_size, granularity = data.draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (4, 1), (4, 8)]))
    longest = data.draw(st.integers(8, 60))
    unit = math.lcm(page_size, granularity)
    windows = data.draw(st.sampled_from([(None,), (None, None), (2,), (5, None), (None, 4), (None, 3, 9)]))
    least = -(-(2 * max(filter(None, windows), default=0) + 3 * unit) // page_size) + 3
    simulation = Simulation(
        page_size=page_size,
        granularity=granularity,
        num_pages=1 + -(-longest // page_size) + data.draw(st.integers(0, 8)),
        chunk=data.draw(st.integers(1, 40)),
        slots=data.draw(st.integers(1, 6)),
        depth=data.draw(st.integers(1, 3)),
        windows=windows,
        window_pages=least + data.draw(st.integers(0, 8)) if None in windows else 0,
        radix=data.draw(st.booleans()),
        policy=data.draw(st.sampled_from([FIRST_COME, *POLICIES, RANDOM])),
        conservativeness=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
    )
    requests = []
    for index in range(data.draw(st.integers(1, 10))):
        total = data.draw(st.integers(1, longest))
        shared = data.draw(st.integers(0, total))
        num_prompt = data.draw(st.integers(1, total))
        prompt = (tokens_of(0, shared) + tokens_of(index + 1, total - shared))[:num_prompt]
        requests.append(
            make(
                f"r{index}",
                prompt,
                total - num_prompt,
                seed=index % 3,
                ignore_eos=data.draw(st.booleans()),
                logprobs=data.draw(logprob_options(num_prompt)),
            )
        )
    simulation.submit(*requests)
    simulation.run()
    check_outputs(simulation, requests)
    simulation.replay()


class Programs(RuleBasedStateMachine):
    """Random commands, a tiny pool, failing steps now and then: each request ends once, then everything is back."""

    rids = Bundle("rids")

    @staticmethod
    def simulation_options() -> dict[str, object]:
        return {"num_pages": 14, "slots": 3, "chunk": 8, "context_len": 60, "queue": 5}

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation(**self.simulation_options())
        self.requests: dict[str, Request] = {}
        self.silent: set[str] = set()

    @rule(
        target=rids,
        family=st.integers(0, 2),
        length=st.integers(1, 50),
        new=st.one_of(st.none(), st.integers(0, 40)),
        ignore_eos=st.booleans(),
        priority=st.integers(0, 3),
        score_from=st.one_of(st.none(), st.integers(0, 50)),
    )
    def submit(
        self, family: int, length: int, new: int | None, ignore_eos: bool, priority: int, score_from: int | None
    ) -> str:
        rid = f"r{len(self.requests)}"
        request = make(
            rid,
            tokens_of(family, length),
            new,
            ignore_eos=ignore_eos,
            namespace=str(family // 2),
            priority=priority,
            logprobs=None if score_from is None else LogprobOptions(start=min(score_from, length)),
        )
        try:
            self.simulation.submit(request)
            self.requests[rid] = request
        except (Overloaded, BadRequest):
            return "refused"
        return rid

    @rule(rid=rids)
    def abort(self, rid: str) -> None:
        self.simulation.scheduler.abort(rid)

    @rule(rid=rids, cut=st.integers(0, 3))
    def stop(self, rid: str, cut: int) -> None:
        seen = len(self.simulation.tokens.get(rid, ()))
        if rid in self.requests and rid not in self.simulation.ends and rid not in self.silent:
            self.simulation.drain()
            if rid not in self.simulation.ends:
                self.silent.add(rid)
                self.simulation.scheduler.abort(rid, keep_tokens=max(0, seen - cut))

    @rule()
    def abort_all(self) -> None:
        self.simulation.scheduler.abort_all()

    @rule()
    def flush(self) -> None:
        scheduler = self.simulation.scheduler
        nobody_runs = not (scheduler.num_running or self.simulation.results)
        assert scheduler.flush() == (nobody_runs and (scheduler.paused or not scheduler.num_waiting))

    @rule(mode=st.sampled_from(["in_place", "retract", "abort"]))
    def pause(self, mode: str) -> None:
        self.simulation.scheduler.pause(mode)
        assert mode == "in_place" or not self.simulation.launch()

    @rule()
    def resume(self) -> None:
        self.simulation.scheduler.resume()

    @rule(number=st.integers(1, 30))
    def steps(self, number: int) -> None:
        for _ in range(number):
            self.simulation.step()

    @rule()
    def failing_step(self) -> None:
        self.simulation.step(fail=True)

    @rule()
    def launch(self) -> None:
        if len(self.simulation.results) < 3:
            self.simulation.launch()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.simulation.scheduler.check()

    def teardown(self) -> None:
        simulation = self.simulation
        simulation.scheduler.resume()
        simulation.run()
        simulation.replay()
        assert set(simulation.ends) | self.silent == set(self.requests)
        assert not set(simulation.ends) & self.silent
        for rid, end in simulation.ends.items():
            expected, why = reference(self.requests[rid], 60)
            tokens = tuple(simulation.tokens[rid])
            if end.finish.type == "abort":
                assert tokens == expected[: len(tokens)]
            else:
                assert (tokens, end.finish.type) == (expected, why)
                check_logprobs(simulation, self.requests[rid], len(tokens))


class ProgramsWithWindows(Programs):
    @staticmethod
    def simulation_options() -> dict[str, object]:
        return {"num_pages": 30, "slots": 3, "chunk": 8, "context_len": 60, "page_size": 2} | {
            "windows": (None, 5, 3),
            "window_pages": 12,
        }


class ProgramsWithPriorities(Programs):
    @staticmethod
    def simulation_options() -> dict[str, object]:
        return Programs.simulation_options() | {"priorities": True, "preemption_gap": 2, "policy": "lpm"}


class ProgramsWithoutTree(Programs):
    @staticmethod
    def simulation_options() -> dict[str, object]:
        return {"num_pages": 40, "slots": 3, "chunk": 8, "context_len": 60, "page_size": 1, "radix": False} | {
            "windows": (None, 4)
        }


class ProgramsWithStepsOfOneKind(Programs):
    @staticmethod
    def simulation_options() -> dict[str, object]:
        return Programs.simulation_options() | {"mixes": False}


TestPrograms = Programs.TestCase
TestPrograms.settings = limits
TestProgramsWithWindows = ProgramsWithWindows.TestCase
TestProgramsWithWindows.settings = limits
TestProgramsWithPriorities = ProgramsWithPriorities.TestCase
TestProgramsWithPriorities.settings = limits
TestProgramsWithoutTree = ProgramsWithoutTree.TestCase
TestProgramsWithoutTree.settings = limits
TestProgramsWithStepsOfOneKind = ProgramsWithStepsOfOneKind.TestCase
TestProgramsWithStepsOfOneKind.settings = limits
