import time

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from hornbeam.core.errors import ConfigError
from hornbeam.text.chat import ChatTemplate
from hornbeam.text.formats.gguf import read_metadata
from hornbeam.text.tokenizer import Tokenizer, load_tokenizer


def metadata(pre="smollm", **changes):
    tokens = ["<|s|>", "<|e|>", *sorted(ByteLevel.alphabet()), "12", "in", "ing", "<tool>"]
    kinds = [3, 3, *[1] * (len(tokens) - 3), 4]
    entries = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": ["1 2", "i n"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "eot_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in entries.items() if value is not None}


def pieces(text, **changes):
    tokenizer = Tokenizer(read_metadata(metadata(**changes)))
    return [tokenizer.token_text(i) for i in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.pure
def test_facts():
    contents = read_metadata(metadata() | {"tokenizer.chat_template": "T"})
    assert contents.special_tokens == {"bos_token": "<|s|>", "eos_token": "<|e|>"}
    assert (contents.bos_id, contents.eos_ids, contents.chat_template) == (0, {0, 1}, "T")
    tokenizer = Tokenizer(contents)
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.decode(tokenizer.encode("<|s|>a<tool>é")) == "a<tool>é"
    assert tokenizer.vocab_size == 262


@pytest.mark.pure
def test_pre_tokenizers_differ_as_named():
    assert pieces("a12", pre="smollm") == ["a", "1", "2"]
    assert pieces("a12", pre="gpt-2") == ["a", "12"]
    assert pieces("a12", pre=None) == ["a", "12"]
    assert pieces("a12", pre="llama-bpe") == ["a", "12"]
    assert pieces("a12", pre="qwen2") == ["a", "1", "2"]
    assert pieces("ing", pre="llama-bpe") == ["ing"]  # whole words first
    assert pieces("ing", pre="qwen2") == ["in", "g"]
    assert "".join(pieces("e\u0301", pre="qwen2")).encode() != "e\u0301".encode()


@pytest.mark.pure
def test_bos_where_the_file_or_the_kind_says():
    def first(**changes):
        return Tokenizer(read_metadata(metadata(**changes))).encode("a")[0] == 0

    assert first(pre="llama-bpe")
    assert not first(pre="llama-bpe", add_bos_token=False)
    assert not first()
    assert first(add_bos_token=True)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "'llama' is not supported"),
        ({"pre": "unheard-of"}, "known are: default, gpt-2, smollm"),
        ({"tokens": None}, r"lacks tokenizer\.ggml\.tokens"),
        ({"model": None}, "has no tokenizer"),
        ({"merges": ["1 nothing"]}, "do not fit"),
        ({"eos_token_id": 5000}, "eos_token_id is 5000"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_metadata(metadata(**changes))


@pytest.mark.cpu
def test_reference_model(smollm2_gguf, smollm2_reference):
    started = time.perf_counter()
    tokenizer = load_tokenizer(smollm2_gguf)
    seconds = time.perf_counter() - started
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    for case in smollm2_reference["prompts"]:
        if case["messages"]:
            assert template.render(case["messages"]) == case["prompt"]
        assert tokenizer.encode(case["prompt"], add_special_tokens=False) == case["prompt_ids"]
        assert tokenizer.decode(case["greedy_ids"], skip_special_tokens=False) == case["greedy_text"]
    assert tokenizer.eos_ids == {2}
    assert seconds < 2  # 0.2 s on an idle machine
