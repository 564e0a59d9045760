"""Qwen's mixtures against transformers, on tiny random checkpoints in float32."""

from pathlib import Path
from typing import Any

import pytest
from family_parity import assert_every_expert_agrees, assert_parity, reference, save_checkpoint

pytestmark = pytest.mark.cpu

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
ROWS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 56},
    "qwen2_moe, renormalized": {"shared_expert_intermediate_size": 56, "norm_topk_prob": True, "qkv_bias": False},
    "qwen3_moe": {"head_dim": 24, "norm_topk_prob": True},
    "qwen3_moe, dense layers": {"decoder_sparse_step": 2, "mlp_only_layers": [0], "num_hidden_layers": 4},
    "qwen3_moe, biases": {"attention_bias": True, "mlp_only_layers": [1], "num_experts_per_tok": 6},
}


@pytest.mark.parametrize("row", ROWS)
def test_logprobs_equal_the_reference(tmp_path: Path, row: str) -> None:
    folder = save_checkpoint(tmp_path, row.partition(",")[0], EXPERTS | ROWS[row])
    assert_parity(folder, reference(folder))


@pytest.mark.parametrize("row", ["qwen2_moe", "qwen3_moe, biases"])
def test_every_weight_matters(tmp_path: Path, row: str) -> None:
    assert_every_expert_agrees(save_checkpoint(tmp_path, row.partition(",")[0], EXPERTS | ROWS[row]))
