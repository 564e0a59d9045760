import contextlib
import random
import time
from itertools import pairwise

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from hornbeam.core.errors import ConfigError
from hornbeam.text.chat import ChatTemplate
from hornbeam.text.formats.gguf import read_metadata
from hornbeam.text.loading import load_tokenizer
from hornbeam.text.tokenizer import Tokenizer


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
def test_pre_tokenizers_that_see_capitals():
    assert words("aBcD efG 1234", "gpt-4o") == ["a", "Bc", "D", " ef", "G", " ", "123", "4"]
    assert words("It's/\n", "gpt-4o") == ["It's", "/\n"]
    assert words("It's 12", "tekken") == ["It", "'s", " ", "1", "2"]


def words(text, pre):
    backend = read_metadata(metadata(pre=pre)).backend
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


PIECES = ["\u2581", "a", "b", "c", "ab", "bc", "\u2581a", "\u2581ab", "abc", "cc", "\u2581\u2581", "aa", "ca"]


def sentencepiece(**changes):
    """Control tokens, bytes, then pieces; the later a piece, the lower its score."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, "[tool]"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    entries = {"model": "llama", "tokens": pieces, "scores": scores, "token_type": kinds, **ids, **changes}
    return read_metadata({f"tokenizer.ggml.{name}": value for name, value in entries.items() if value is not None})


def join_best(text):
    """SentencePiece's rule, step by step: of all neighbours join those whose piece scores highest, leftmost first."""
    symbols = list(text)
    while True:
        joined = [(PIECES.index(a + b), i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES]
        if not joined:
            return symbols
        at = min(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@pytest.mark.pure
def test_sentencepiece_joins_by_score():
    contents = sentencepiece()
    chance = random.Random(0)
    for _ in range(300):
        text = "".join(chance.choices("abc ", k=chance.randrange(1, 12)))
        expected = join_best("\u2581" + text.replace(" ", "\u2581"))
        assert contents.backend.encode(text).tokens == expected, text
        assert contents.backend.decode(contents.backend.encode(text).ids) == text


@pytest.mark.pure
def test_sentencepiece_facts():
    tokenizer = Tokenizer(sentencepiece())
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.special_ids == {1, 2}
    ids = tokenizer.encode("a\u00e9")
    assert ids[0] == 1
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids[1:]) == " a\u00e9".encode()
    assert tokenizer.decode(ids) == "a\u00e9"
    bare = Tokenizer(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert [bare.token_text(token_id) for token_id in bare.encode("ab[tool] a")] == ["ab", "[tool]", " a"]
    with pytest.raises(ConfigError, match="differ in number"):
        sentencepiece(scores=[0.0])


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "runn", "##ing", "cafe", ",", "é"]


@pytest.mark.cpu
def test_wordpiece_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    theirs = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    # As converters write it: a mark where a word begins instead of one where it goes on
    marked = [word if word[0] == "[" else word[2:] if word[0] == "#" else f"\u2581{word}" for word in WORDS]
    entries = {"model": "bert", "tokens": marked, "token_type": [3] * 4 + [1] * 8, "bos_token_id": 2}
    ids = {"unknown_token_id": 1, "seperator_token_id": 3, "cls_token_id": 2, "padding_token_id": 0}
    tokenizer = Tokenizer(read_metadata({f"tokenizer.ggml.{name}": value for name, value in (entries | ids).items()}))
    for text in ("Unaffable, running café", "[SEP]un", "runnrunn", "", "ééé \u6771"):
        for special in (True, False):
            assert tokenizer.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
    assert tokenizer.decode(tokenizer.encode("unaffable runn")) == "unaffable runn"


@pytest.mark.pure
def test_named_chat_templates():
    named = {"tokenizer.chat_template": "D", "tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "R"}
    contents = read_metadata(metadata() | named)
    assert (contents.chat_template, contents.named_templates) == ("D", {"rag": "R"})


@pytest.mark.pure
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "'t5' is not supported"),
        ({"model": "bert"}, "lacks the id of its unknown, CLS or SEP token"),
        ({"pre": "unheard-of"}, "known are: default, gpt-2, .*smollm"),
        ({"tokens": None}, r"lacks tokenizer\.ggml\.tokens"),
        ({"model": None}, "has no tokenizer"),
        ({"merges": ["1 nothing"]}, "do not fit"),
        ({"eos_token_id": 5000}, "eos_token_id is 5000"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_metadata(metadata(**changes))


@pytest.mark.pure
@pytest.mark.parametrize("wrong", [0, -1, 3.5, "x", "", [], ["a"], [1], True, 2**40])
def test_values_of_wrong_types(wrong):
    """They are refused, or serve by chance; nothing else happens."""
    for entry in [*metadata(), "tokenizer.chat_template", "tokenizer.chat_templates"]:
        with contextlib.suppress(ConfigError):
            Tokenizer(read_metadata(metadata() | {entry: wrong})).encode("a")


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
