"""Random checkpoints whose sizes GPU kernels take, and what an engine says of them."""

from pathlib import Path
from typing import Any

import torch

PROMPTS = [[1, 17, 23, 5, 99], [7] * 40, list(range(3, 200)), [250, 3]]
PARAMS = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
FLAGS = {"max_total_tokens": 4096, "max_running_requests": 8, "skip_tokenizer_init": True}

_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "initializer_range": 0.08,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> transformers' type of model, settings
    "dense": ("llama", {}),
    "mixture": ("qwen3_moe", {"head_dim": 64, **_EXPERTS}),
    "latent": ("deepseek_v3", _LATENT),
}


def save_random(folder: Path, kind: str) -> Path:
    """A checkpoint of that kind, as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_SIZES | settings))
    model.save_pretrained(folder)
    return folder


def greedy_tokens(path: Path, **flags: Any) -> list[list[int]]:
    """Two rounds: the second one finds the prompts in the prefix cache, which changes no token in float32. Of the four
    requests one after the other ends, so that steps of four rows down to one are part of it."""
    from hornbeam import Engine

    params = [{**PARAMS, "max_new_tokens": number} for number in (24, 6, 18, 12)]
    with Engine(model_path=str(path), **{**FLAGS, **flags}) as engine:
        rounds = [engine.generate(input_ids=PROMPTS, sampling_params=params) for _ in range(2)]
    assert sum(answer["meta_info"]["cached_tokens"] for answer in rounds[1]) > 0
    first, second = ([answer["output_ids"] for answer in answers] for answers in rounds)
    assert first == second or flags["dtype"] != "float32"
    return first
