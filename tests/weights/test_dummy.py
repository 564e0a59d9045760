import json
from pathlib import Path

import pytest
import torch
from harness import make_engine

pytestmark = pytest.mark.cpu

DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "torch_dtype": "float32",
}
SIGMOID_MIXTURE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def drawn(folder: Path, config: dict[str, object], seed: int) -> dict[str, torch.Tensor]:
    (folder / "config.json").write_text(json.dumps(config))
    engine = make_engine(folder, load_format="dummy", random_seed=seed)
    return dict(engine.executor._runner.model.named_parameters())


def test_weights_look_real_and_follow_seed_and_name(tmp_path: Path) -> None:
    first, again, other = (drawn(tmp_path, DENSE, seed) for seed in (0, 0, 1))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            spread = 1 if name == "embed.weight" else 0.002 if "output" in name or "down" in name else 0.02
            assert not torch.equal(parameter, other[name])
            assert abs(parameter.std().item() / spread - 1) < 0.1
            assert abs(parameter.mean().item() / spread) < 0.1
    assert not torch.equal(first["layers.0.mlp.down.weight"], first["layers.1.mlp.down.weight"])


def test_an_embedding_that_is_the_head_gives_plain_logits(tmp_path: Path) -> None:
    parameters = drawn(tmp_path, DENSE | {"tie_word_embeddings": True}, 0)
    assert "head.weight" not in parameters
    assert 0.018 < parameters["embed.weight"].std() < 0.022


def test_nothing_prefers_some_experts(tmp_path: Path) -> None:
    parameters = drawn(tmp_path, SIGMOID_MIXTURE, 0)
    assert (parameters["layers.1.mlp.correction"] == 0).all()
    assert parameters["layers.1.mlp.gate.weight"].std() > 0.01
