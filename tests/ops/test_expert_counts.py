"""Distinct experts per step: counted as defined, by both ways of counting, and reported by the command."""

import json
from pathlib import Path

import pytest
import torch

from hornbeam.bench.expert_counts import ExpertCounts, count_experts

CONFIG = Path(__file__).parents[2] / "hornbeam/bench/configs/qwen3-30b-a3b/config.json"
IDS = {
    "none": torch.full((3, 2), -1),
    "one token": torch.tensor([[4, 2]]),
    "padding": torch.tensor([[4, 2], [2, 0], [-1, -1]]),
    "many": torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(1500)]),
}
EXPECTED = {"none": [0, 0, 0], "one token": [2, 2, 1], "padding": [3, 6 * (1 - (4 / 6) ** 2), 1], "many": [6, 6, 1]}


@pytest.mark.cpu
@pytest.mark.parametrize("name", IDS)
def test_counts_as_defined(name):
    totals = torch.zeros(3, dtype=torch.float64)
    count_experts(IDS[name].int(), 6, totals)
    assert totals.tolist() == pytest.approx(EXPECTED[name])


@pytest.mark.parametrize("name", IDS)
def test_the_kernel_counts_alike(device, name):
    pytest.importorskip("triton")
    from hornbeam.bench.triton_expert_counts import count_experts_kernel

    totals = torch.ones(3, dtype=torch.float64, device=device)
    count_experts_kernel(IDS[name].int().to(device), 6, 4 / 6, totals)
    assert (totals - 1).tolist() == pytest.approx(EXPECTED[name], abs=1e-5)


@pytest.mark.pure
def test_too_few_experts_are_told():
    assert "does not count" in ExpertCounts(distinct=97.9, expected=100.0).line()
    assert "does not count" not in ExpertCounts(distinct=98.1, expected=100.0).line()


@pytest.mark.cpu
def test_the_command_tells(tmp_path, capsys):
    from hornbeam.bench.cli import main
    from hornbeam.ops.moe.contract import ROUTING

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 12000, "num_attention_heads": 2, "head_dim": 16}
    sizes |= {"num_key_value_heads": 1, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(json.loads(CONFIG.read_text()) | sizes))
    flags = ["--model-path", str(tmp_path), "--load-format", "dummy", "--device", "cpu", "--max-total-tokens", "1024"]
    before = ROUTING.names()
    assert main(["offline", "--scale", "0.01", "--workload", "single", "--count-experts", *flags]) == 0
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert ROUTING.names() == before
    assert 2 <= line["experts"]["distinct"] <= 8
    assert line["experts"]["expected"] == pytest.approx(2.0, abs=0.5)  # decode steps of one row, and a prompt of one
