import json

import pytest

from hornbeam.bench.offline import measure
from hornbeam.bench.workloads import prefix, single
from hornbeam.core.errors import HornbeamError


class FakeEngine:
    """Answers with as many tokens as asked, less `missing`."""

    def __init__(self, missing: int = 0) -> None:
        self._missing = missing
        self.calls: list[str] = []

    def generate(self, *, input_ids, sampling_params):
        self.calls.append("generate")
        assert all(params["ignore_eos"] for params in sampling_params)
        return [
            {"output_ids": [1] * (params["max_new_tokens"] - self._missing), "meta_info": {"cached_tokens": len(ids)}}
            for ids, params in zip(input_ids, sampling_params, strict=True)
        ]

    def flush_cache(self) -> bool:
        self.calls.append("flush")
        return True


@pytest.mark.pure
def test_each_run_begins_with_an_empty_cache():
    engine = FakeEngine()
    measurement = measure(engine, single(0.1))
    assert engine.calls == ["flush", "generate"] * 2
    assert (measurement.input_tokens, measurement.output_tokens) == (13, 26)


@pytest.mark.pure
def test_counts():
    measurement = measure(FakeEngine(), prefix(0.1))
    assert measurement.num_requests == 4
    assert measurement.cached_tokens == measurement.input_tokens == 4 * (205 + 6)
    assert measurement.as_json()["output_tokens"] == 4 * 6


@pytest.mark.pure
def test_a_short_answer_is_an_error():
    with pytest.raises(HornbeamError, match="request 0 has 25 tokens, not 26"):
        measure(FakeEngine(missing=1), single(0.1))


@pytest.mark.cpu
def test_command_line_on_a_tiny_model(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    import hornbeam.bench.workloads as workloads
    from hornbeam.bench.cli import main

    monkeypatch.setattr(workloads, "_END_ID", 300)
    path = tmp_path / "lines.json"
    flags = ["--model-path", str(tiny_checkpoint), "--device", "cpu", "--max-total-tokens", "1024"]
    assert main(["offline", "--scale", "0.01", "--workload", "mix", "single", "--json", str(path), *flags]) == 0
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["workload"] for line in lines] == ["mix", "single"]
    assert all(line["seconds"] > 0 and line["startup_seconds"] > 0 for line in lines)
    assert "tok/s out" in capsys.readouterr().out


@pytest.mark.pure
@pytest.mark.parametrize("scale", ["0", "2"])
def test_a_scale_out_of_range_is_refused(scale, capsys):
    from hornbeam.bench.cli import main

    assert main(["offline", "--scale", scale]) == 1
    assert "--scale" in capsys.readouterr().err


@pytest.mark.cpu
def test_a_data_set_and_where_time_goes(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    import hornbeam.bench.workloads as workloads
    from hornbeam.bench.cli import main

    monkeypatch.setattr(workloads, "_END_ID", 300)
    path, trace = tmp_path / "lines.json", tmp_path / "trace.json"
    flags = ["--model-path", str(tiny_checkpoint), "--device", "cpu", "--max-total-tokens", "1024", "--scale", "0.01"]
    flags += ["--dataset-name", "random", "--num-prompts", "3", "--random-input", "9", "--random-output", "4"]
    flags += ["--profile", "--profile-trace", str(trace), "--json", str(path)]
    assert main(["offline", *flags]) == 0
    (line,) = map(json.loads, path.read_text("utf-8").splitlines())
    assert (line["workload"], line["num_requests"]) == ("random", 3)
    split = line["profile"]
    stages = sum(value for name, value in split.items() if "CPU" in name or "waiting" in name)
    assert stages == pytest.approx(split["seconds"], rel=0.01)
    assert 0 < split["device busy"] <= split["seconds"]
    assert "device busy" in capsys.readouterr().out
    assert json.loads(trace.read_text("utf-8"))["traceEvents"]
