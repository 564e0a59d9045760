"""GPT-OSS against transformers, on tiny random checkpoints in float32, plain and with MXFP4 experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_parity import assert_every_expert_agrees, assert_parity, reference, save_checkpoint
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.cpu

SETTINGS: dict[str, Any] = {
    "head_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 20,
    "swiglu_limit": 0.5,
    "num_hidden_layers": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}


def test_logprobs_equal_the_reference(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "gpt_oss", SETTINGS)
    assert_parity(folder, reference(folder))


def test_every_weight_matters(tmp_path: Path) -> None:
    assert_every_expert_agrees(save_checkpoint(tmp_path, "gpt_oss", SETTINGS), num_groups=2)


def test_experts_in_four_bits_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    """The same model twice: with packed experts, and with what transformers' own decoder makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    plain = save_checkpoint(tmp_path / "plain", "gpt_oss", SETTINGS)
    packed = tmp_path / "packed"
    packed.mkdir()
    tensors = load_file(plain / "model.safetensors")
    decoded = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (num_experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 126, blocks.shape[:3], dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(tensors, packed / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    save_file(rest | decoded, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert_parity(packed, reference(plain))
