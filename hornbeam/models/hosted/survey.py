"""Looks at a model of transformers without its weights: which attention calls one pass makes, and whether ours serve.

The pass runs on the meta device, so it takes a fraction of a second whatever the model's size.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hornbeam.core.config_reader import ConfigReader
from hornbeam.core.errors import ConfigError
from hornbeam.models.hosted.attention import IMPLEMENTATION, Hook, register
from hornbeam.models.hosted.config import HostedConfig, HostedLayer

# Arguments of attention calls that we know, and those that leave its result as it is
_KNOWN = {
    *("scaling", "sliding_window", "softcap", "s_aux"),
    *("dropout", "is_causal", "layer_idx", "position_embeddings", "position_ids", "cache_position", "training"),
    *("use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}
_NUM_TOKENS = 3


def survey(hf_config: Mapping[str, Any], code: Path | None = None) -> HostedConfig:
    """Build the model without memory and follow one pass. Raises ConfigError for what cannot be hosted.

    code: the checkpoint's folder, if the code in it may be run.
    """
    config = read_config(hf_config, code)
    model_class = class_of(config, hf_config, code)
    if getattr(model_class, "_is_stateful", False):
        raise ConfigError("it keeps a state between tokens (state-space or recurrent layers), which is not supported")
    _refuse_settings(config)
    calls = _follow(config, model_class)
    _check_coverage(config, calls)
    shapes = {call.shape for call in calls}
    if len(shapes) != 1:
        raise ConfigError("its layers differ in heads, their sizes or soft caps, which is not supported")
    (shape,) = shapes
    if shape.value_dim > shape.head_dim or shape.num_heads % shape.num_kv_heads:
        raise ConfigError(f"its heads are not supported: {shape}")
    return HostedConfig(
        architecture=model_class.__name__,
        num_layers=len(calls),
        dtype=ConfigReader(hf_config).dtype(),
        attention_scale=calls[0].layer.scale,
        hf_config=hf_config,
        code=code,
        layers=tuple(call.layer for call in calls),
        attention_soft_cap=shape.soft_cap,
        attention_sinks=shape.sinks,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_len=config.max_position_embeddings,
    )


def read_config(hf_config: Mapping[str, Any], code: Path | None) -> PreTrainedConfig:
    """The config as an object of transformers, set to call our attention."""
    if any(str(name).startswith("gguf:") for name in hf_config["architectures"]):
        raise ConfigError("tensors of GGUF files are known to model families only, not to transformers' modules")
    register()
    model_type = hf_config.get("model_type")
    config_class = own_class("AutoConfig", hf_config, code)
    if config_class is None:
        if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
            raise ConfigError(f"transformers {transformers.__version__} does not know model_type {model_type!r}")
        config_class = transformers.CONFIG_MAPPING[model_type]
    try:
        config = config_class.from_dict(
            dict(hf_config), attn_implementation=IMPLEMENTATION, use_cache=False, return_dict=True
        )
    except Exception as error:  # configs are checked by code of their own, and fail as it likes
        raise ConfigError(f"transformers cannot read its config: {_first_line(error)}") from error
    config.pad_token_id = None  # nothing is padded; where it is set, some models look for it in each step
    return config


def class_of(config: PreTrainedConfig, hf_config: Mapping[str, Any], code: Path | None) -> Any:
    """The class that continues texts, if that is the architecture which the config names."""
    model_class: Any = own_class("AutoModelForCausalLM", hf_config, code)
    if model_class is None:
        model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        raise ConfigError(f"transformers has no causal language model for model_type {config.model_type!r}")
    if model_class.__name__ not in hf_config["architectures"]:
        raise ConfigError(f"of {config.model_type} only {model_class.__name__} can be run")
    return model_class


def own_class(role: str, hf_config: Mapping[str, Any], code: Path | None) -> Any:
    """The class that the checkpoint itself brings for `role` ("AutoConfig", ...), if its code may be run; else None."""
    own = hf_config.get("auto_map")
    if code is None or not isinstance(own, Mapping) or role not in own:
        return None
    try:
        return get_class_from_dynamic_module(own[role], code)
    except Exception as error:  # whatever the code raises, and whatever is wrong with its name
        raise ConfigError(f"its own code for {role} cannot be loaded: {_first_line(error)}") from error


def body_name(model: PreTrainedModel) -> str:
    """The name of the module that does everything but the head."""
    body = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is body), "")
    if not name:
        raise ConfigError("its head cannot be told apart from the rest")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    soft_cap: float | None
    sinks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    layer: HostedLayer
    shape: _Shape


def _follow(config: PreTrainedConfig, model_class: Any) -> list[_Call]:
    """The attention calls of one pass."""
    calls: list[_Call] = []
    names: dict[nn.Module, str] = {}

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tensor:
        _refuse_call(module, settings)
        scale = settings.get("scaling")
        layer = HostedLayer(
            module=names[module],
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            window=settings.get("sliding_window"),
        )
        shape = _Shape(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            soft_cap=settings.get("softcap"),
            sinks=settings.get("s_aux") is not None,
        )
        calls.append(_Call(layer=layer, shape=shape))
        return value.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])

    try:
        with torch.device("meta"), torch.no_grad():
            model = model_class._from_config(config, dtype=torch.bfloat16, attn_implementation=IMPLEMENTATION)
            names.update((module, name) for name, module in model.named_modules())
            Hook(record).attach(model)
            body = model.get_submodule(body_name(model))
            if "position_ids" not in inspect.signature(body.forward).parameters:
                raise ConfigError("it cannot be told the positions of its tokens")
            ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long)
            body(input_ids=ids, position_ids=torch.arange(_NUM_TOKENS)[None], use_cache=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever foreign code raises where it meets something that it does not expect
        raise ConfigError(f"transformers cannot run it this way: {_first_line(error)}") from error
    return calls


def _refuse_settings(config: PreTrainedConfig) -> None:
    """What would change the mathematics without showing in the attention calls."""
    if config.is_encoder_decoder:
        raise ConfigError("it is an encoder-decoder, which is not supported")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError("its weights are quantized in a way that is not supported")
    if getattr(config, "attention_chunk_size", None):
        raise ConfigError("its attention is cut into chunks, which is not supported")
    if getattr(config, "alibi", False):
        raise ConfigError("its attention has linear biases (ALiBi), which are not supported")
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        raise ConfigError("its config lacks max_position_embeddings; give it by --json-model-override-args")
    rope = getattr(config, "rope_parameters", None) or {}
    if "longrope" in {rope.get("rope_type"), *(sub.get("rope_type") for sub in rope.values() if isinstance(sub, dict))}:
        raise ConfigError("its rotary factors (longrope) depend on the longest text of a batch, which is not supported")


def _refuse_call(module: nn.Module, settings: Mapping[str, Any]) -> None:
    unknown = [name for name, value in settings.items() if name not in _KNOWN and not _is_unset(value)]
    if unknown:
        raise ConfigError(f"its attention takes {', '.join(sorted(unknown))}, which is not supported")
    if not settings.get("is_causal", getattr(module, "is_causal", True)):
        raise ConfigError("its attention looks ahead, so it cannot continue texts")


def _is_unset(value: Any) -> bool:
    return value is None or value is False


def _check_coverage(config: PreTrainedConfig, calls: list[_Call]) -> None:
    """Each layer attends once through our function, with the window that the config tells."""
    num_layers = config.num_hidden_layers
    if len(calls) != num_layers or len({call.layer.module for call in calls}) != num_layers:
        raise ConfigError(f"{len(calls)} of its {num_layers} layers attend through transformers' attention interface")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"] * num_layers
    for kind, call in zip(kinds, calls, strict=True):
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"its layers of kind {kind!r} are not supported")
        if (kind == "sliding_attention") != (call.layer.window is not None):
            raise ConfigError(f"{call.layer.module} does not pass on its sliding window, so it cannot be kept")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
