"""The simulator, and what it says of the policies: caches that suffice are used, and nobody waits for ever."""

import pytest

from hornbeam.bench.simulate import Sessions, Simulation, run_simulations
from hornbeam.core.errors import ConfigError

pytestmark = pytest.mark.pure

LOAD = Sessions(num_sessions=200, num_system_prompts=40, sessions_per_second=400.0)


def test_the_lines() -> None:
    load = Sessions(num_sessions=3, num_turns=2)
    lines = list(run_simulations(["fcfs", "random"], load, 100_000))
    assert [line.split()[0] for line in lines[:3]] == ["policy", "fcfs", "random"]
    assert len(lines) == 5
    assert lines == list(run_simulations(["fcfs", "random"], load, 100_000))
    with pytest.raises(ConfigError, match="at least one session"):
        Sessions(num_sessions=0)


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
def test_under_pressure_cache_aware_policies_beat_fcfs_and_starve_nobody(policy: str) -> None:
    first, aware = (Simulation(name, LOAD, 60_000, 0).run() for name in ("fcfs", policy))
    assert aware.output_tokens_per_second > first.output_tokens_per_second
    assert aware.hit_rate > first.hit_rate
    assert aware.longest_wait < 3 * first.longest_wait


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "dfs-weight"])
def test_a_pool_for_the_working_set_hits_like_an_unbounded_one(policy: str) -> None:
    enough, unbounded = (Simulation(policy, LOAD, size, 0).run() for size in (300_000, 5_000_000))
    assert unbounded.hit_rate - enough.hit_rate < 0.03
