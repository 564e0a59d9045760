"""What cannot be hosted is refused, with the reason, before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import make_engine
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import hornbeam
from hornbeam.core.errors import ConfigError
from hornbeam.models.hosted.spec import HostedFamily
from hornbeam.models.hosted.tests.test_parity import MODELS, OTHER, PROMPT, save
from hornbeam.models.index import find_family

pytestmark = pytest.mark.cpu

CHUNKS = {"intermediate_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 16}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("MambaForCausalLM", {}, "state"),
    "jamba": ("JambaForCausalLM", {}, "state"),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}, "1 of its 2 layers|kind 'conv'"),
    "bloom": ("BloomForCausalLM", {"max_position_embeddings": 64}, "positions of its tokens|0 of its 2 layers"),
    "falcon": ("FalconForCausalLM", {}, "cannot run it this way|0 of its 2 layers"),
    "bart": ("BartForCausalLM", {}, "encoder-decoder"),
    "t5": ("T5ForConditionalGeneration", {}, "no causal language model"),
    "bert": ("BertLMHeadModel", {}, "looks ahead"),
    "llama4_text": ("Llama4ForCausalLM", CHUNKS, "cut into chunks"),
    "diffllama": ("DiffLlamaForCausalLM", {}, "4 of its 2 layers"),
    "gpt2": ("GPT2ForSequenceClassification", {}, "only GPT2LMHeadModel can be run"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_hosted(model_type: str) -> None:
    architecture, settings, reason = REFUSED[model_type]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    config = AutoConfig.for_model(model_type, **(sizes | settings)).to_dict() | {"architectures": [architecture]}
    with pytest.raises(ConfigError, match=reason):
        HostedFamily().parse(config)
    with pytest.raises(
        ConfigError, match=rf"no model family serves {architecture}; supported are .*LlamaFor.*({reason})"
    ):
        find_family(config)


def test_code_that_comes_with_a_checkpoint() -> None:
    config = {"architectures": ["Own"], "model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    with pytest.raises(ConfigError, match=r"does not know model_type 'own'.*--trust-remote-code"):
        HostedFamily().parse(config)


def test_gguf_files_need_a_family() -> None:
    with pytest.raises(ConfigError, match="GGUF files are known to model families only"):
        HostedFamily().parse({"architectures": ["gguf:gpt2"], "model_type": "gpt2"})


def test_a_model_that_is_chosen_by_hand() -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    assert find_family(config).name == "hosted"
    with pytest.raises(ConfigError, match="--model-impl hornbeam"):
        find_family(config, model_impl="hornbeam")
    with pytest.raises(ConfigError, match="Unheard cannot run by --model-impl transformers"):
        find_family({"architectures": ["Unheard"]}, model_impl="transformers")


def test_tokens_that_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution, say, that is no attention call: it would see other requests' tokens."""
    folder = save("gpt2", MODELS["gpt2"], tmp_path)
    plain = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, x: plain(self, x + x.roll(1, 1)))
    with pytest.raises(ConfigError, match="see each other outside of attention"):
        make_engine(folder)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    file = save("gpt2", MODELS["gpt2"], tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.ln_f.weight"] = torch.ones(3)
    del tensors["transformer.h.0.ln_1.bias"]
    tensors["surplus.weight"] = torch.ones(1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        make_engine(tmp_path)
    for said in (
        "missing:\n  transformer.h.0.ln_1.bias",
        "surplus.weight",
        "transformer.ln_f.weight [3], expected [64]",
    ):
        assert said in str(caught.value)


def test_names_without_the_usual_prefix(tmp_path: Path) -> None:
    """As in files that were saved from the body alone, with masks that old versions stored."""
    file = save("gpt2", MODELS["gpt2"], tmp_path) / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, file, metadata={"format": "pt"})
    make_engine(tmp_path)


def test_batches_with_a_cached_prefix_through_the_engine(tmp_path: Path) -> None:
    folder = save("stablelm", MODELS["stablelm"], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [PROMPT, OTHER, PROMPT[:32] + OTHER]
    with hornbeam.Engine(
        model_path=str(folder), skip_tokenizer_init=True, max_total_tokens=1024, chunked_prefill_size=16
    ) as engine:
        params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
        engine.generate(input_ids=PROMPT, sampling_params=params)
        answers = engine.generate(input_ids=prompts, sampling_params=params)
        assert engine.get_server_info()["architectures"] == ["StableLmForCausalLM"]
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert answer["output_ids"] == expected[0, len(prompt) :].tolist()
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [32, 0, 32]


def test_dummy_weights(tmp_path: Path) -> None:
    folder = save("gpt2", MODELS["gpt2"], tmp_path)
    (folder / "model.safetensors").unlink()
    make_engine(folder, load_format="dummy")
