import subprocess
import sys
from typing import Any

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.models.llama.spec import FAMILY
from hornbeam.ops.rope.scaling import LinearScaling, RopeScaling, WavelengthScaling

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALING = WavelengthScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_len=8192)


@pytest.mark.pure
def test_a_plain_config() -> None:
    config = FAMILY.parse(BASE)
    assert (config.architecture, config.dtype, config.head_dim) == ("LlamaForCausalLM", "bfloat16", 8)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.context_len) == (2, 4, 2, 64)
    assert (config.rope.theta, config.rope.scaling) == (10000.0, None)
    assert (config.tie_word_embeddings, config.qkv_bias, config.output_bias, config.mlp_bias) == (False,) * 4
    (spec,) = FAMILY.cache_specs(config)
    assert (spec.kind, spec.layers, spec.row_shapes, spec.dtype) == ("full", (0, 1), ((2, 8), (2, 8)), "bfloat16")


@pytest.mark.pure
@pytest.mark.parametrize(
    ("settings", "theta", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 5e5, SCALING),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, 5e5, SCALING),
        ({"rope_theta": 5, "rope_scaling": {"type": "linear", "factor": 2}}, 5.0, LinearScaling(factor=2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, None),
    ],
)
def test_both_spellings_of_rotary_settings(settings: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    config = FAMILY.parse(BASE | settings)
    assert (config.rope.theta, config.rope.scaling) == (theta, scaling)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rotary scaling 'spiral'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": "linear"}, "must be an object"),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_parameters": {"partial_rotary_factor": 0.4}},
            "rotary_dim = 3",
        ),
        ({"rotary_dim": 16}, "rotary_dim = 16"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": 2}}, "list of 4 numbers"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer"),
        ({"sliding_window": 32, "layer_types": ["full_attention"] * 3}, "layer_types must be 2 of"),
        ({"sliding_window": 32, "layer_types": ["full_attention", "chunked"]}, "layer_types must be 2 of"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer"),
        ({"num_attention_heads": [4, 4]}, "num_attention_heads must be"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype must be one of"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        FAMILY.parse(BASE | settings)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("architecture", "settings", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 32}, (32, 32, 32)),
        ("MistralForCausalLM", {"sliding_window": 64}, (None, None, None)),  # it hides nothing
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("Phi3ForCausalLM", {"sliding_window": 32}, (32, 32, 32)),
        ("Qwen2ForCausalLM", {"sliding_window": 32}, (None, None, None)),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": True}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0},
            (32, 32, 32),
        ),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 32),
        ),
        (
            "Qwen2ForCausalLM",
            {
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (32, None, None),
        ),
        ("LlamaForCausalLM", {"sliding_window": 32}, (None, None, None)),  # a leftover of the model it was made of
        ("MinistralForCausalLM", {"sliding_window": 32}, (32, 32, 32)),
        ("Exaone4ForCausalLM", {"sliding_window": 32, "sliding_window_pattern": 2}, (32, None, 32)),
        (
            "SmolLM3ForCausalLM",
            {"sliding_window": 32, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
            (None, 32, None),
        ),
    ],
)
def test_windows(architecture: str, settings: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = FAMILY.parse(BASE | {"architectures": [architecture], "num_hidden_layers": 3} | settings)
    assert config.windows == windows
    groups = {(spec.window, layer) for spec in FAMILY.cache_specs(config) for layer in spec.layers}
    assert groups == {(window, layer) for layer, window in enumerate(windows)}


@pytest.mark.pure
def test_yarn_widens_the_context() -> None:
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
    assert FAMILY.parse(BASE | yarn).context_len == 256


@pytest.mark.pure
def test_what_a_row_says_where_the_config_does_not() -> None:
    config = FAMILY.parse(BASE | {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 5})
    assert [rope is not None for rope in config.ropes] == [True, True, True, False, True]
    assert config.tie_word_embeddings


@pytest.mark.pure
def test_settings_that_configs_leave_out() -> None:
    assert FAMILY.parse(BASE | {"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128
    seed = FAMILY.parse(BASE | {"architectures": ["SeedOssForCausalLM"], "head_dim": None})
    assert (seed.head_dim, seed.qkv_bias, seed.output_bias) == (8, True, False)


@pytest.mark.pure
def test_gguf_files_alone_have_permuted_heads() -> None:
    config = FAMILY.parse(BASE)
    assert {place.transform for place in FAMILY.weight_map(config).values()} == {"none"}
    places = FAMILY.weight_map(FAMILY.parse(BASE | {"architectures": ["gguf:llama"]}))
    permuted = {name.rpartition(".layers.")[2]: p.heads for name, p in places.items() if p.transform != "none"}
    assert permuted == {f"{i}.self_attn.{n}_proj.weight": heads for i in (0, 1) for n, heads in (("q", 4), ("k", 2))}


@pytest.mark.pure
def test_gguf_files_of_other_rows_keep_their_heads_order() -> None:
    biased = FAMILY.parse(BASE | {"architectures": ["gguf:qwen2"], "attention_bias": True})
    normed = FAMILY.parse(BASE | {"architectures": ["gguf:qwen3"]})
    assert (biased.qkv_bias, biased.output_bias, normed.qkv_bias, normed.qk_norm) == (True, False, False, "head")
    for config in (biased, normed):
        assert {place.transform for place in FAMILY.weight_map(config).values()} == {"none"}


@pytest.mark.pure
def test_the_spec_imports_no_torch() -> None:
    code = "import sys, hornbeam.models.llama.spec; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.cpu
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_weight_map_names_what_transformers_saves(tied: bool, bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(BASE | settings)))
    names = set(theirs.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert FAMILY.weight_map(FAMILY.parse(BASE | settings)).keys() == names


@pytest.mark.cpu
def test_a_config_that_transformers_writes() -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.LlamaConfig(
        **(BASE | {"max_position_embeddings": 16384}),
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    )
    config = FAMILY.parse(written.to_dict())
    assert (config.rope.theta, config.rope.scaling, config.rms_norm_eps) == (5e5, SCALING, 1e-5)
