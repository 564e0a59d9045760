import json

import pytest

pytestmark = pytest.mark.cpu


def test_every_page_comes_back(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    import hornbeam.bench.engine_soak as soak
    from hornbeam.bench.cli import main

    for name, value in (("MAX_PROMPT", 20), ("MAX_NEW", 3), ("LONG", 30), ("MAX_PATIENCE", 0.02), ("NUM_CLIENTS", 8)):
        monkeypatch.setattr(soak, name, value)
    path = tmp_path / "rounds.json"
    flags = [
        "--model-path",
        str(tiny_checkpoint),
        "--device",
        "cpu",
        "--max-total-tokens",
        "1024",
        "--longest-prompt",
        "60",
    ]
    assert main(["engine-soak", "--requests", "80", "--json", str(path), *flags]) == 0
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["num_requests"] for line in rounds] == list(range(8, 81, 8))
    assert 0 < rounds[-1]["num_cancelled"] < 80
    assert rounds[-1]["host_bytes"] > 0
    assert "longest gap" in capsys.readouterr().out
