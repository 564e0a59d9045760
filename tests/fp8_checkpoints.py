"""Tiny checkpoints whose products are eight-bit floats in blocks, and what transformers makes of them.

The reference shares no code with Hornbeam: each linear layer of transformers' model gets the widened weight and rounds
what it is given, block by block in Python.
"""

import json
from pathlib import Path
from typing import Any

import torch
from family_parity import NUM_NEW, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PLAIN = ("embed_tokens", "lm_head", "norm", "layernorm", "gate.weight")
STATED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def blocks(shape: torch.Size) -> list[tuple[int, int, slice, slice]]:
    """Of a matrix: row and column of each, and the slices it takes."""
    places = [(r, c) for r in range(0, shape[0], 128) for c in range(0, shape[1], 128)]
    return [(r // 128, c // 128, slice(r, r + 128), slice(c, c + 128)) for r, c in places]


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = torch.empty_like(weight), torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for r, c, rows, columns in blocks(weight.shape):
        scales[r, c] = weight[rows, columns].abs().max() / 448
        values[rows, columns] = weight[rows, columns] / scales[r, c]
    return values.to(torch.float8_e4m3fn), scales


def save_fp8(
    folder: Path, model_type: str, settings: dict[str, Any], plain: tuple[str, ...] = (), **stated: Any
) -> Path:
    """A random checkpoint whose products are rounded, but for those whose names contain one of `plain`."""
    save_checkpoint(folder, model_type, settings)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        kept = tensor.dim() < 2 or any(part in name for part in (*PLAIN, *plain))
        if kept or not name.endswith(".weight"):
            tensors[name] = tensor
        else:
            tensors[name], tensors[f"{name}_scale_inv"] = rounded(tensor)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    listed = [name.removesuffix(".weight") for name in tensors if any(part in name for part in plain)]
    quantization = STATED | stated | ({"modules_to_not_convert": ["lm_head", *listed]} if listed else {})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


class Rounding(nn.Module):
    """What a quantized linear layer computes."""

    def __init__(self, weight: Tensor, bias: Tensor | None, power_of_two: bool, exact: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.power_of_two, self.exact = weight, bias, power_of_two, exact

    def forward(self, x: Tensor) -> Tensor:
        rows = [x] if self.exact else [self.rounded(part) for part in x.split(128, -1)]
        out = torch.cat(rows, -1) @ self.weight.T
        return out if self.bias is None else out + self.bias

    def rounded(self, part: Tensor) -> Tensor:
        scale = part.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
        if self.power_of_two:
            scale = 2 ** scale.log2().ceil()
        return (part / scale).to(torch.float8_e4m3fn).float() * scale


@torch.inference_mode()
def emulated(folder: Path, prompt: list[int]) -> list[Tensor]:
    """Logprobs [V] after the prompt and after each greedy token, by transformers with rounding layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = json.loads((folder / "config.json").read_text())
    power_of_two = stored.pop("quantization_config").get("scale_fmt") is not None
    config = AutoConfig.for_model(**stored)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    tensors = load_file(folder / "model.safetensors")
    scales = {name: tensors.pop(name) for name in [*tensors] if name.endswith("_scale_inv")}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in scales:
            tensors[name] = widened(tensor.float(), scales[f"{name}_scale_inv"])
    fill(model, tensors, scales, power_of_two)
    ids, rows = list(prompt), []
    for _ in range(NUM_NEW):
        rows.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        ids.append(int(rows[-1].argmax()))
    return rows


def widened(values: Tensor, scales: Tensor) -> Tensor:
    for r, c, rows, columns in blocks(values.shape):
        values[rows, columns] *= scales[r, c]
    return values


def fill(model: nn.Module, tensors: dict[str, Tensor], scales: dict[str, Tensor], power_of_two: bool) -> None:
    """Load `tensors`; linear layers that have scales become rounding ones. Experts are put one by one."""
    for name, module in [*model.named_modules()]:
        weight = tensors.get(f"{name}.weight")
        if (
            hasattr(module, "gate_up_proj")
            and hasattr(module, "down_proj")
            and isinstance(module.down_proj, nn.Parameter)
        ):
            parts = [
                [f"{name}.{e}.{part}_proj.weight" for part in ("gate", "up", "down")]
                for e in range(len(module.down_proj))
            ]
            experts = [
                [Rounding(tensors.pop(part), None, power_of_two, f"{part}_scale_inv" not in scales) for part in expert]
                for expert in parts
            ]
            module.forward = experts_forward(experts)
        elif isinstance(module, nn.Linear) and f"{name}.weight_scale_inv" in scales:
            assert weight is not None
            parent = model.get_submodule(name.rpartition(".")[0])
            bias, exact = tensors.pop(f"{name}.bias", None), name.endswith("kv_b_proj")
            setattr(parent, name.rpartition(".")[2], Rounding(weight, bias, power_of_two, exact))
            del tensors[f"{name}.weight"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(".experts." in name or "lm_head" in name for name in missing), missing


def experts_forward(experts: list[list[Rounding]]) -> Any:
    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, chosen in enumerate(ids.tolist()):
            for slot, expert in enumerate(chosen):
                gate, up, down = experts[expert]
                row = x[token : token + 1]
                out[token] += weights[token, slot] * down(torch.nn.functional.silu(gate(row)) * up(row))[0]
        return out

    return forward
