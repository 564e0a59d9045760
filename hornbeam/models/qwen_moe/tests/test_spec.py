from typing import Any

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.models.qwen_moe.spec import FAMILY

pytestmark = pytest.mark.pure

BASE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
OLDER = BASE | {"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 24}


def test_which_layers_have_experts() -> None:
    assert FAMILY.parse(BASE).sparse_layers == (True,) * 4
    config = FAMILY.parse(BASE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert config.sparse_layers == (False, True, False, False)


def test_the_rows_differ_in_biases_norms_and_the_shared_expert() -> None:
    older, newer = FAMILY.parse(OLDER), FAMILY.parse(BASE | {"attention_bias": True})
    assert (older.qkv_bias, older.output_bias, older.qk_norm, older.shared_size) == (True, False, "none", 24)
    assert (newer.qkv_bias, newer.output_bias, newer.qk_norm, newer.shared_size) == (True, True, "head", None)


def test_windows_count_only_where_they_are_on() -> None:
    windowed = OLDER | {"sliding_window": 8, "max_window_layers": 3}
    assert FAMILY.parse(windowed).windows == (None,) * 4
    assert FAMILY.parse(windowed | {"use_sliding_window": True}).windows == (8, None, 8, None)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_experts_per_tok": 5}, "5 of 4 experts"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
    ],
)
def test_what_is_not_implemented_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        FAMILY.parse(BASE | settings)
