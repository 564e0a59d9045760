from pathlib import Path

import pytest

import hornbeam
from hornbeam.core.errors import ConfigError
from hornbeam.engine.build import build_engine
from hornbeam.scheduler.record import read_record, replay


@pytest.mark.cpu
def test_a_recorded_run_replays_without_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    flags = {"device": "cpu", "max_total_tokens": 256, "record_schedule": str(record)}
    with hornbeam.Engine(model_path=str(tiny_checkpoint), **flags) as engine:
        sampling = {"temperature": 0, "max_new_tokens": 6}
        answers = engine.generate(["one two three", "one two", "four"], sampling)
        assert engine.generate("one two three", sampling)["text"] == answers[0]["text"]
        numbers = engine.get_server_info()["internal_states"][0]
    assert numbers["total_finished"] == numbers["total_requests"] == 4
    assert numbers["total_seconds_steps"] > 0
    stats = replay(read_record(record.read_bytes().splitlines())).stats()
    assert stats.total_generated_tokens == numbers["total_generated_tokens"]
    with pytest.raises(ConfigError, match=r"--record-schedule .* cannot be written"):
        hornbeam.Engine(model_path=str(tiny_checkpoint), **flags | {"record_schedule": str(tmp_path)})


@pytest.mark.pure
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"architectures": ["Unheard"]}', "no model family serves Unheard"),
    ],
)
def test_overrides_reach_the_config(tmp_path: Path, overrides: str, reason: str) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(ConfigError, match=reason):
        build_engine({"model_path": str(tmp_path), "load_format": "dummy", "json_model_override_args": overrides})
