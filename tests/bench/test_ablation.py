import json

import pytest

from hornbeam.bench import ablation
from hornbeam.bench.ablation import EXTRAS, PARTS
from hornbeam.bench.workloads import WORKLOADS
from hornbeam.config.flags import FLAGS
from hornbeam.core.errors import ConfigError, HornbeamError
from hornbeam.serve.cli import FlagParser

pytestmark = pytest.mark.pure


def test_each_part_is_switched_by_flags_that_exist():
    defaults = {flag.name: flag.default for flag in FLAGS}
    for name, part in {**PARTS, **EXTRAS}.items():
        parser = FlagParser("ablation", "")
        parser.add_flags()
        values = parser.parse_flags(list(part.flags))
        changed = {name for name, value in values.items() if value not in (None, defaults.get(name))}
        assert changed, name
        assert set(part.workloads) <= set(WORKLOADS), name


def test_a_variant_that_fails_ends_nothing_else(monkeypatch, tmp_path, capsys):
    """All runs, with their workloads and flags; times double where overlap is off."""
    calls = []

    def run(workloads, flags):
        calls.append((list(workloads), flags))
        if "--disable-mixed-chunk" in flags:
            raise HornbeamError("no memory")
        seconds = 2.0 if "--disable-overlap-schedule" in flags else 1.0
        rates = {"output_tokens_per_second": 1.0, "total_tokens_per_second": 2.0}
        return {name: {"workload": name, "seconds": seconds, "startup_seconds": 3.0} | rates for name in workloads}

    monkeypatch.setattr(ablation, "_run", run)
    out = tmp_path / "out.jsonl"
    flags = ["--without", "mixed steps", "overlap", "radix cache", "--workload", "mix", "--dtype", "float32"]
    assert ablation.main([*flags, "--json", str(out)]) == 1
    assert [workloads for workloads, _ in calls] == [["mix"]] * 3  # the radix cache is for another workload
    assert all("float32" in flags for _, flags in calls)
    text = capsys.readouterr().out
    assert "without mixed steps: no memory" in text
    assert "+100.0%" in text
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["variant"] for result in results] == ["all on", "without overlap"]


def test_workloads_that_show_nothing_of_a_part_are_told():
    with pytest.raises(ConfigError, match="radix cache: prefix"):
        ablation.main(["--without", "radix cache", "--workload", "mix", "single"])
