"""GGUF files of the family's rows hold the same model."""

from pathlib import Path
from typing import Any

import pytest
from family_parity import assert_parity, reference, save_checkpoint
from gguf_files import read_tensors, stacked_experts, write_mixture

pytestmark = pytest.mark.cpu

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
FILES: dict[str, dict[str, Any]] = {
    "qwen2moe": {"shared_expert_intermediate_size": 56},
    "qwen3moe": {"head_dim": 24, "norm_topk_prob": True},
}


@pytest.mark.parametrize("architecture", FILES)
def test_same_logprobs(tmp_path: Path, architecture: str) -> None:
    settings = EXPERTS | FILES[architecture]
    folder = save_checkpoint(tmp_path, architecture.replace("moe", "_moe"), settings)
    metadata = {"expert_feed_forward_length": settings["moe_intermediate_size"]}
    if "shared_expert_intermediate_size" in settings:
        metadata["expert_shared_feed_forward_length"] = settings["shared_expert_intermediate_size"]
    file = tmp_path / "model.gguf"
    tensors = {  # converters drop dimensions of one
        name: tensor.squeeze() for name, tensor in stacked_experts(read_tensors(folder)).items()
    }
    write_mixture(file, architecture, folder, tensors, **metadata)
    assert_parity(file, reference(folder))
