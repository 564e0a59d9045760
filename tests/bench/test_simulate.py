"""The simulator, and what it says of the policies: caches that suffice are used, and nobody waits for ever."""

from pathlib import Path

import pytest
from scheduler.simulation import Simulation as Checked
from scheduler.simulation import make, tokens_of

from hornbeam.bench.cli import main
from hornbeam.bench.simulate import Sessions, Simulation, burst, recorded, run_simulations, streams_and_a_long_prompt
from hornbeam.core.errors import ConfigError
from hornbeam.scheduler.record import read_record

pytestmark = pytest.mark.pure

LOAD = Sessions(num_sessions=200, num_turns=5, num_system_prompts=40, sessions_per_second=400.0).draw(0)


def test_the_lines() -> None:
    load = Sessions(num_sessions=3, num_turns=2).draw(1)
    lines = list(run_simulations(["fcfs", "random"], load, 100_000))
    assert [line.split()[0] for line in lines[:3]] == ["policy", "fcfs", "random"]
    assert len(lines) == 5
    assert lines == list(run_simulations(["fcfs", "random"], load, 100_000))
    with pytest.raises(ConfigError, match="at least one session"):
        Sessions(num_sessions=0)


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
def test_under_pressure_cache_aware_policies_beat_fcfs_and_starve_nobody(policy: str) -> None:
    first, aware = (Simulation(name, LOAD, 60_000).run() for name in ("fcfs", policy))
    assert aware.output_tokens_per_second > first.output_tokens_per_second
    assert aware.hit_rate > first.hit_rate
    assert aware.longest_wait < 3 * first.longest_wait


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "dfs-weight"])
def test_a_pool_for_the_working_set_hits_like_an_unbounded_one(policy: str) -> None:
    enough, unbounded = (Simulation(policy, LOAD, size).run() for size in (300_000, 5_000_000))
    assert unbounded.hit_rate - enough.hit_rate < 0.03


def test_a_long_prompt_hardly_disturbs_running_streams() -> None:
    outcome = Simulation("fcfs", streams_and_a_long_prompt(), 200_000).run()
    assert outcome.p99_gap <= 2 * outcome.median_gap
    assert outcome.longest_wait < 4.0


def test_a_burst_is_served_as_fast_as_without_regard_for_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    fair = Simulation("fcfs", burst(128), 400_000).run()
    monkeypatch.setattr("hornbeam.scheduler.planning.MAX_SLOWDOWN", 1e9)
    assert fair.output_tokens_per_second > 0.97 * Simulation("fcfs", burst(128), 400_000).run().output_tokens_per_second


def test_a_recorded_run_is_a_load_and_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was aborted before it generated anything is left out."""
    run = Checked()
    requests = [make(f"r{index}", tokens_of(index, 10), 5 + index) for index in range(4)]
    run.submit(*requests)
    run.scheduler.abort("r3")
    run.run()
    record = tmp_path / "record.jsonl"
    record.write_bytes(run.record.getvalue())
    load = recorded(read_record(record.read_bytes().splitlines()))
    assert [turn.question for (turn,) in load] == [request.prompt_ids for request in requests[:3]]
    assert [turn.answer for (turn,) in load] == [tuple(run.tokens[f"r{index}"]) for index in range(3)]
    assert Simulation("fcfs", load, 1000).run().num_requests == 3
    assert main(["replay", str(record)]) == 0
    assert main(["simulate", "--policy", "fcfs", "--record", str(record)]) == 0
    assert "the same plans" in capsys.readouterr().out
