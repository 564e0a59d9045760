"""Each op's cases run, agree with the reference, and say what work they mean."""

import json

import pytest

from hornbeam.bench.kernel_cases import CASES

pytestmark = pytest.mark.cpu

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}


def test_every_op_is_measured_and_right(tmp_path, capsys):
    from hornbeam.bench.kernels import main

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    results = tmp_path / "results.jsonl"
    assert main(["--model-path", str(tmp_path), "--rows", "1", "3", "--json", str(results)]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["op"] for line in lines} == set(CASES)
    assert all(line["right"] and line["seconds"] > 0 and line["num_bytes"] > 0 for line in lines)
    products = [line for line in lines if line["shape"] == "gate_up 3x32->96"]
    assert {line["num_flops"] for line in products} == {2 * 3 * 32 * 96}
    assert "TFLOP/s" in capsys.readouterr().out


def test_a_folder_without_a_config_is_refused(tmp_path):
    from hornbeam.bench.kernels import main
    from hornbeam.core.errors import ConfigError

    with pytest.raises(ConfigError, match=r"config\.json"):
        main(["--model-path", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="num_attention_heads"):
        main(["--model-path", str(tmp_path)])
