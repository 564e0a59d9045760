"""How configs are read, in all the ways in which they are written."""

import subprocess
import sys
from typing import Any

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.models.gemma.spec import FAMILY
from hornbeam.ops.rope.scaling import LinearScaling

pytestmark = pytest.mark.pure

BASE = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 25,
    "torch_dtype": "bfloat16",
}


def test_every_sixth_layer_sees_everything() -> None:
    config = FAMILY.parse(BASE)
    assert config.windows == (8, 8, 8, 8, 8, None, 8)
    assert config.attention_scale == 0.2
    assert (config.attention_soft_cap, config.logits_soft_cap) == (None, None)
    assert (config.rope.theta, config.window_rope.theta) == (1e6, 1e4)
    full, window = FAMILY.cache_specs(config)
    assert (full.kind, full.layers) == ("full", (5,))
    assert (window.kind, window.window, window.layers) == ("window", 8, (0, 1, 2, 3, 4, 6))


def test_every_second_layer_sees_everything_and_scores_are_capped() -> None:
    config = FAMILY.parse(BASE | {"architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 3, "rope_theta": 7.0})
    assert config.windows == (8, None, 8)
    assert (config.attention_soft_cap, config.logits_soft_cap) == (50.0, 30.0)
    assert config.rope == config.window_rope
    assert config.rope.theta == 7.0
    uncapped = FAMILY.parse(BASE | {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": None})
    assert (uncapped.attention_soft_cap, uncapped.logits_soft_cap) == (None, 30.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 5.0, "rope_local_base_freq": 3.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
            }
        },
    ],
)
def test_both_spellings_of_two_rotations(settings: dict[str, Any]) -> None:
    config = FAMILY.parse(BASE | settings)
    assert (config.rope.theta, config.rope.scaling) == (5.0, LinearScaling(factor=8.0))
    assert (config.window_rope.theta, config.window_rope.scaling) == (3.0, None)


def test_published_configs_of_larger_models_say_little_of_their_text_part() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    config = FAMILY.parse(
        {"architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16", "text_config": text}
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.context_len, config.dtype, config.attention_scale) == (131072, "bfloat16", 256**-0.5)
    assert "language_model.model.layers.33.mlp.up_proj.weight" in FAMILY.weight_map(config)


@pytest.mark.parametrize(("num_layers", "divisor"), [(61, 16), (62, 32 / 4)])
def test_gguf_files_tell_the_scale_by_the_number_of_layers(num_layers: int, divisor: float) -> None:
    settings = {"architectures": ["gguf:gemma3"], "num_hidden_layers": num_layers, "query_pre_attn_scalar": None}
    config = FAMILY.parse(BASE | settings)
    assert config.attention_scale == divisor**-0.5


def test_gguf_files_alone_hold_norms_as_they_are() -> None:
    for architecture, transform in (("Gemma3ForCausalLM", "add_one"), ("gguf:gemma3", "none")):
        places = FAMILY.weight_map(FAMILY.parse(BASE | {"architectures": [architecture]}))
        norms = {place.transform for name, place in places.items() if "norm" in name}
        others = {place.transform for name, place in places.items() if "norm" not in name}
        assert (norms, others) == ({transform}, {"none"})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"final_logit_softcapping": -1}, "final_logit_softcapping must be a positive number"),
        ({"sliding_window_pattern": [True, False]}, "sliding_window_pattern must be a positive integer"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        FAMILY.parse(BASE | settings)


def test_the_spec_imports_no_torch() -> None:
    code = "import sys, hornbeam.models.gemma.spec; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
