import math
from typing import Any

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.models.deepseek.spec import FAMILY

pytestmark = pytest.mark.pure

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
BASE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_scaling": YARN,
    "max_position_embeddings": 163840,
    "vocab_size": 129280,
}
OLDER = BASE | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}


def test_the_cache_holds_one_row_of_latent_and_rotated_features() -> None:
    config = FAMILY.parse(BASE)
    (spec,) = FAMILY.cache_specs(config)
    assert (spec.row_shapes, spec.sharding, config.num_kv_heads, config.latent.rank) == (
        ((1, 576),),
        "replicated",
        1,
        512,
    )
    assert spec.bytes_per_token(2) == 6 * 1152
    assert FAMILY.defaults(config, "cuda") == {"page_size": 64, "chunked_prefill_size": 16384}


def test_yarn_sharpens_the_scores() -> None:
    sharpened = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    assert FAMILY.parse(BASE).attention_scale == pytest.approx(sharpened)
    assert sharpened == pytest.approx(0.13523, abs=1e-5)
    for scaling in (None, YARN | {"mscale_all_dim": 0}):
        assert FAMILY.parse(BASE | {"rope_scaling": scaling}).attention_scale == pytest.approx(192**-0.5)


def test_the_rows_differ_in_how_they_route() -> None:
    newer, older = FAMILY.parse(BASE).gate, FAMILY.parse(OLDER | {"norm_topk_prob": True}).gate
    assert (newer.renormalize, newer.corrected, newer.group_score, newer.num_groups) == (True, True, "two_best", 8)
    assert (older.renormalize, older.corrected, older.num_groups) == (False, False, 1)
    limited = FAMILY.parse(OLDER | {"topk_method": "group_limited_greedy"}).gate
    assert (limited.group_score, limited.num_groups, limited.num_kept_groups) == ("best", 8, 4)


def test_which_layers_have_experts_and_what_is_left_unread() -> None:
    config = FAMILY.parse(BASE | {"moe_layer_freq": 2})
    assert config.sparse_layers == (False, False, False, False, True, False)
    assert FAMILY.unread(config) == ("model.layers.6.",)
    assert FAMILY.parse(BASE | {"n_shared_experts": None}).shared_size == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"n_group": 7}, "that cannot be"),
        ({"topk_group": 9}, "that cannot be"),
        ({"num_experts_per_tok": 129}, "that cannot be"),
        ({"q_lora_rank": None, "attention_bias": True}, "q_lora_rank"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
    ],
)
def test_what_is_not_implemented_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        FAMILY.parse(BASE | settings)
