"""A GGUF file, where the model goes by the name of its dense sibling, holds the same model."""

from pathlib import Path

import pytest
from family_parity import assert_parity, reference, save_checkpoint
from gguf_files import pair_rows, read_tensors, stacked_experts, write_mixture

pytestmark = pytest.mark.cpu

NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def test_same_logprobs(tmp_path: Path) -> None:
    settings = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}
    folder = save_checkpoint(tmp_path, "mixtral", settings)
    tensors = {}
    for name, tensor in stacked_experts(read_tensors(folder)).items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        *place, part, _ = name.split(".")
        if part in NAMES:
            name = f"{'.'.join(place).replace('block_sparse_moe', 'mlp')}.{NAMES[part]}.weight"
        tensors[name] = tensor if heads is None else pair_rows(tensor, heads)
    write_mixture(tmp_path / "model.gguf", "llama", folder, tensors)
    assert_parity(tmp_path / "model.gguf", reference(folder))
