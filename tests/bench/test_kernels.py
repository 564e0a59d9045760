"""Each op's cases run, agree with the reference, and say what work they mean."""

import json

import pytest

from hornbeam.bench.kernel_cases import CASES

pytestmark = pytest.mark.cpu

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
}
LATENT_MIXTURE = DENSE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
}
OF_HEADS = {"qkv", "decode_attention", "prefill_attention"}
OF_LATENTS = {"latent_rows", "latent_attention"}
OF_MIXTURES = {"routing", "experts"}


@pytest.mark.parametrize(
    ("config", "absent", "fewest_rows"),
    [(DENSE, OF_LATENTS | OF_MIXTURES, "3"), (LATENT_MIXTURE, OF_HEADS, "2")],
    ids=["dense", "latent mixture"],
)
def test_every_op_of_the_model_is_measured_and_right(tmp_path, capsys, monkeypatch, config, absent, fewest_rows):
    from hornbeam.bench import latent_cases
    from hornbeam.bench.kernels import main

    monkeypatch.setattr(latent_cases, "CONTEXT", 96)
    monkeypatch.setattr(latent_cases, "PROMPT", 16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    results = tmp_path / "results.jsonl"
    assert main(["--model-path", str(tmp_path), "--rows", "1", fewest_rows, "--json", str(results)]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["op"] for line in lines} == set(CASES) - absent
    assert all(line["right"] and line["seconds"] > 0 and line["num_bytes"] > 0 for line in lines)
    products = [line for line in lines if line["shape"] == f"gate_up {fewest_rows}x32->96"]
    assert {line["num_flops"] for line in products} == {2 * int(fewest_rows) * 32 * 96}
    assert "TFLOP/s" in capsys.readouterr().out


def test_a_folder_without_a_config_is_refused(tmp_path):
    from hornbeam.bench.kernels import main
    from hornbeam.core.errors import ConfigError

    with pytest.raises(ConfigError, match=r"config\.json"):
        main(["--model-path", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps({"architectures": DENSE["architectures"]}))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        main(["--model-path", str(tmp_path)])
