"""GGUF files of tiny models, written by the gguf package under its own names."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def stacked_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of single experts as one of all, under the name without the expert's number."""
    found: dict[str, Tensor | list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        if match := _ONE_EXPERT.fullmatch(name):
            found.setdefault(f"{match[1]}.{match[3]}", []).append(tensors[name])
        else:
            found[name] = tensors[name]
    return {name: torch.stack(parts) if isinstance(parts, list) else parts for name, parts in found.items()}


def write_mixture(path: Path, architecture: str, folder: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """Write `tensors` by the names that the gguf package knows, and what the config in `folder` says."""
    config = json.loads((folder / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["qk_nope_head_dim"] + head_dim if "qk_nope_head_dim" in config else head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    num_experts = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    for name, tensor in tensors.items():
        target = names.get_name(name, (".weight", ".bias"))
        assert target is not None, name
        writer.add_tensor(target if "." in target[-8:] else f"{target}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def pair_rows(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows i and i + D/2 of each head side by side, as converters order them for some architectures."""
    return tensor.view(num_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
