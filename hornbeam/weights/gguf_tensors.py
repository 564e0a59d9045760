"""A GGUF file in Hugging Face's terms: its metadata as a config, its tensors under the usual names.

The translation is the same for every architecture; what it does not know keeps its GGUF name, so that the loader
can name it.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hornbeam.core.errors import ConfigError
from hornbeam.weights.gguf import GgufFile, GgufTensor

if TYPE_CHECKING:
    from torch import Tensor

# metadata key behind "<architecture>." -> config.json key
_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.dimension_count": "rotary_dim",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_gating_func": "expert_gating_func",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length_mla": "qk_head_dim",
    "attention.value_length_mla": "v_head_dim",
    "attention.value_length": "value_length",
}
_TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_BETWEEN_NORMS = {"blk.0.ffn_norm.weight", "blk.0.post_attention_norm.weight"}  # the former is usually the latter
_ROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
_SINGLE_FACTORS = "rope_freqs.weight"  # the same for contexts of any length
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<what>\w+)\.(?P<kind>weight|bias)")
_WHOLE_NAMES = {"attn_sinks": "self_attn.sinks", "exp_probs_b": "mlp.gate.e_score_correction_bias"}
_KEYS, _VALUES = "attn_k_b.weight", "attn_v_b.weight"  # of a latent: there, one projection makes both
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)")  # those of all experts in one tensor
_DTYPES = {"F32": "float32", "F16": "float16"}  # of blocks, whose numbers had the range of bfloat16: that


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeysAndValues:
    """One projection of a latent of R features, head by head to a key and a value, in two tensors."""

    name: str
    keys: GgufTensor  # [H, R, K]
    values: GgufTensor  # [H, V, R]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the projection."""
        num_heads, rank, key_size = self.keys.shape
        return num_heads * (key_size + self.values.shape[1]), rank


@dataclass(frozen=True, slots=True)
class GgufTensors:
    """A `TensorSource` over one GGUF file; tensors are dequantized to float32 as they are read."""

    file: GgufFile

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Row-major shape of every tensor by its Hugging Face name."""
        return {name: tensor.shape for name, tensor in self._tensors().items()}

    def read(self, names: Collection[str]) -> Iterator[tuple[str, "Tensor"]]:
        """The named tensors in file order. Raises ConfigError for a block format that is not supported."""
        for name, tensor in self._tensors().items():
            if name in names:
                try:
                    yield name, _decoded(tensor)
                except ConfigError as error:
                    raise ConfigError(f"{self.file.path}: tensor {tensor.name}: {error}") from error

    def _tensors(self) -> dict[str, GgufTensor | _KeysAndValues]:
        factors = (_SINGLE_FACTORS, *_ROPE_FACTORS.values())  # told by the config
        tensors = {name: tensor for name, tensor in self.file.tensors.items() if name not in factors}
        between = tensors.keys() >= _BETWEEN_NORMS
        named: dict[str, GgufTensor | _KeysAndValues] = {}
        for name, tensor in tensors.items():
            if match := _EXPERTS.fullmatch(name):
                layer, what, kind = match.groups()
                places = f"model.layers.{layer}.mlp.experts.{{}}.{what}_proj.{kind}"
                named |= {places.format(expert): part for expert, part in enumerate(_unstacked(tensor))}
            elif "_inp_shexp." in name:  # a matrix of one row
                named[hugging_face_name(name)] = dataclasses.replace(tensor, shape=(1, tensor.shape[-1]))
            elif name.endswith(_KEYS):
                values = tensors[name.replace(_KEYS, _VALUES)]
                name = name.replace(_KEYS, "attn_kv_b.weight")
                named[hugging_face_name(name)] = _KeysAndValues(name=name, keys=tensor, values=values)
            elif not name.endswith(_VALUES):
                named[hugging_face_name(name, between_norms=between)] = tensor
        return named


def _decoded(tensor: GgufTensor | _KeysAndValues) -> "Tensor":
    from hornbeam.quant.gguf import dequantize, join_heads  # imports torch, which the server process does without

    if isinstance(tensor, GgufTensor):
        return dequantize(tensor.data, tensor.type_name, tensor.shape)
    return join_heads(_decoded(tensor.keys), _decoded(tensor.values))


def _unstacked(tensor: GgufTensor) -> list[GgufTensor]:
    """Its parts along the first dimension."""
    parts = tensor.data.reshape(tensor.shape[0], -1)
    return [dataclasses.replace(tensor, shape=tensor.shape[1:], data=part) for part in parts]


def hugging_face_name(name: str, *, between_norms: bool = False) -> str:
    """The usual name of GGUF tensor `name`; a name that is not known comes back as it is.

    between_norms: each half of a layer has a norm ahead of it and one behind it.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    layer, what, kind = match.group("layer", "what", "kind")
    if layer is None:
        return f"{_TENSOR_NAMES.get(what, what)}.{kind}"
    if what in _WHOLE_NAMES:
        return f"model.layers.{layer}.{_WHOLE_NAMES[what]}"
    if between_norms and what == "ffn_norm":
        return f"model.layers.{layer}.pre_feedforward_layernorm.{kind}"
    return f"model.layers.{layer}.{_LAYER_TENSOR_NAMES[what]}.{kind}" if what in _LAYER_TENSOR_NAMES else name


def hugging_face_config(file: GgufFile) -> dict[str, Any]:
    """What config.json would say. The architecture is "gguf:", GGUF's own name for it, and "+experts" if there are.

    Raises:
        ConfigError: no architecture or no embedding.
    """
    metadata, tensors = file.metadata, file.tensors
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or "token_embd.weight" not in tensors:
        raise ConfigError(f"{file.path} holds no language model: it lacks an architecture or token_embd.weight")
    embedding = tensors["token_embd.weight"]
    config = {
        ours: metadata[f"{architecture}.{theirs}"]
        for theirs, ours in _CONFIG_KEYS.items()
        if f"{architecture}.{theirs}" in metadata
    }
    if config.get("sliding_window") == 0:
        config["sliding_window"] = None
    if isinstance(config.get("sliding_window_pattern"), list):  # for each layer, whether it has a window
        slides = config.pop("sliding_window_pattern")
        config["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
    config |= {
        "architectures": [
            f"gguf:{architecture}" + ("+experts" if metadata.get(f"{architecture}.expert_count") else "")
        ],
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "dtype": _DTYPES.get(embedding.type_name, "bfloat16"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    return config | _rope_scaling(file, architecture) | special_ids(file)


def special_ids(file: GgufFile) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` as in generation_config.json: a turn's end also ends generation."""
    get = file.metadata.get
    ends = [get("tokenizer.ggml.eos_token_id"), get("tokenizer.ggml.eot_token_id")]
    start = get("tokenizer.ggml.bos_token_id")
    if not all(isinstance(token_id, int | None) for token_id in (start, *ends)):
        raise ConfigError(f"{file.path}: the ids of its first and last tokens must be integers, not {[start, *ends]}")
    unique = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    ids = {
        "bos_token_id": start,
        "eos_token_id": unique[0] if len(unique) == 1 else unique,
    }
    return {name: value for name, value in ids.items() if value not in (None, [])}


def _rope_scaling(file: GgufFile, architecture: str) -> dict[str, Any]:
    """A tensor of divisors, one for each pair of features, overrides what metadata says of the kind."""
    get, key = file.metadata.get, f"{architecture}.rope.scaling."
    scaling = {
        "rope_type": get(key + "type", "none"),
        "factor": get(key + "factor"),
        "original_max_position_embeddings": get(key + "original_context_length"),
        "attention_factor": get(key + "attn_factor"),
    }
    if multiplier := get(key + "yarn_log_multiplier"):
        scaling |= {"mscale": 10 * multiplier, "mscale_all_dim": 10 * multiplier}
    if _SINGLE_FACTORS in file.tensors:
        factors = _numbers(file, _SINGLE_FACTORS)
        scaling |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    elif all(name in file.tensors for name in _ROPE_FACTORS.values()):
        scaling |= {"rope_type": "longrope"} | {ours: _numbers(file, name) for ours, name in _ROPE_FACTORS.items()}
    if scaling["rope_type"] == "none":
        return {}
    return {"rope_scaling": {name: value for name, value in scaling.items() if value is not None}}


def _numbers(file: GgufFile, name: str) -> list[float]:
    tensor = file.tensors[name]
    if tensor.type_name != "F32":
        raise ConfigError(f"{file.path}: tensor {name} must hold float32, not {tensor.type_name}")
    return [float(number) for number in tensor.data.view("<f4")]
