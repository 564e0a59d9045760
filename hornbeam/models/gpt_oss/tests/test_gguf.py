"""A GGUF file, whose tensors of gate and up are apart, holds the same model."""

import json
from pathlib import Path

import pytest
from family_parity import assert_parity, reference, save_checkpoint
from gguf import RopeScalingType
from gguf_files import read_tensors, write_mixture

from hornbeam.models.gpt_oss.tests.test_parity import SETTINGS

pytestmark = pytest.mark.cpu


def test_same_logprobs(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "gpt_oss", SETTINGS | {"swiglu_limit": 7.0})  # which the file does not tell
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        kind = "bias" if name.endswith("_bias") else "weight"
        if "gate_up_proj" in name:
            for start, part in enumerate(("gate_proj", "up_proj")):
                half = tensor[..., start::2]
                place = f"{name[: name.index('gate_up_proj')]}{part}.{kind}"
                tensors[place] = half if kind == "bias" else half.transpose(1, 2)
        elif ".experts.down_proj" in name:
            place = f"{name[: name.index('down_proj')]}down_proj.{kind}"
            tensors[place] = tensor if kind == "bias" else tensor.transpose(1, 2)
        else:
            tensors[name] = tensor
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    write_mixture(
        tmp_path / "model.gguf",
        "gpt-oss",
        folder,
        tensors,
        sliding_window=SETTINGS["sliding_window"],
        expert_feed_forward_length=96,
        rope_scaling_type=RopeScalingType.YARN,
        rope_scaling_factor=rope["factor"],
        rope_scaling_orig_ctx_len=rope["original_max_position_embeddings"],
    )
    assert_parity(tmp_path / "model.gguf", reference(folder))
