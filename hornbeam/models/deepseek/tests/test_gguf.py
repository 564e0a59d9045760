"""GGUF files of both versions, old and new, hold the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
from family_parity import assert_parity, reference, save_checkpoint
from gguf import ExpertGatingFuncType, RopeScalingType
from gguf_files import read_tensors, stacked_experts, write_mixture
from torch import Tensor

from hornbeam.models.deepseek.tests.test_parity import ROWS

pytestmark = pytest.mark.cpu


def in_two_parts(tensors: dict[str, Tensor], num_heads: int, key_size: int) -> dict[str, Tensor]:
    """The projection of the latent to keys, transposed, and to values."""
    parts = {}
    for name, tensor in tensors.items():
        if "kv_b_proj" in name:
            keys, values = tensor.unflatten(0, (num_heads, -1)).split_with_sizes(
                [key_size, tensor.shape[0] // num_heads - key_size], 1
            )
            parts[name.replace("kv_b", "k_b")], parts[name.replace("kv_b", "v_b")] = keys.transpose(1, 2), values
        else:
            parts[name] = tensor
    return parts


@pytest.mark.parametrize(("row", "new"), [("deepseek_v2", True), ("deepseek_v2, lite", False), ("deepseek_v3", True)])
def test_same_logprobs(tmp_path: Path, row: str, new: bool) -> None:
    folder = save_checkpoint(tmp_path, row.partition(",")[0], ROWS[row])
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        name.replace("correction_bias", "correction.bias"): t
        for name, t in stacked_experts(read_tensors(folder)).items()
    }
    metadata: dict[str, Any] = {
        "kv_lora_rank": config["kv_lora_rank"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "value_length": config["v_head_dim"],
    }
    if config["q_lora_rank"]:
        metadata["q_lora_rank"] = config["q_lora_rank"]
    if config["n_group"] > 1:
        metadata |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    if row == "deepseek_v3":
        metadata["expert_gating_func"] = ExpertGatingFuncType.SIGMOID
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        metadata |= {"rope_scaling_type": RopeScalingType.YARN, "rope_scaling_factor": rope["factor"]}
        metadata["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
        metadata["rope_scaling_yarn_log_mul"] = 0.1 * rope["mscale_all_dim"]
    if new:
        tensors = in_two_parts(tensors, config["num_attention_heads"], config["qk_nope_head_dim"])
        metadata["key_length_mla"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        metadata |= {"value_length_mla": config["v_head_dim"], "value_length": config["kv_lora_rank"]}
    write_mixture(tmp_path / "model.gguf", "deepseek2", folder, tensors, **metadata)
    assert_parity(tmp_path / "model.gguf", reference(folder), page_size=16)
