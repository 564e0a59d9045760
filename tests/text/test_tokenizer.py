import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from hornbeam.core.errors import BadRequest, ConfigError
from hornbeam.text.formats.contents import TokenizerContents
from hornbeam.text.loading import load_tokenizer
from hornbeam.text.tokenizer import Tokenizer

pytestmark = pytest.mark.pure


def save(folder, backend, tokenizer_config=None, **files):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {}))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def test_round_trip_and_facts(byte_level):
    text = "größer 東京 👩‍👩‍👧"
    assert byte_level.decode(byte_level.encode(text)) == text
    assert byte_level.vocab_size == 302
    assert byte_level.special_ids == {0, 1, 2}


def test_special_tokens_are_skipped_on_request(byte_level):
    ids = byte_level.encode("<s>Paris</s>")
    assert ids[0] == 0
    assert ids[-1] == 1
    assert byte_level.decode(ids) == "Paris"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s>Paris</s>"


@given(data=st.data())
def test_bytes_of_tokens_spell_what_decode_says(byte_level, data):
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=30))
    spelled = b"".join(map(byte_level.token_bytes, ids)).decode("utf-8", "replace")
    assert spelled == byte_level.decode(ids, skip_special_tokens=False)


def test_bytes_with_byte_fallback(byte_fallback):
    assert [byte_fallback.token_bytes(i) for i in (2 + 0xE2, 258, 259, 261, 263)] == [
        b"\xe2",
        b" ",
        b" the",
        b"s",
        b"  ",
    ]
    assert byte_fallback.token_text(2 + 0xE2) == "\ufffd"


def test_ids_beyond_the_vocabulary_have_no_text(byte_level):
    assert byte_level.token_bytes(100_000) == b""
    assert byte_level.decode([100_000]) == ""


def test_lone_surrogate_is_the_clients_mistake(byte_level):
    with pytest.raises(BadRequest, match="Unicode"):
        byte_level.encode("a\ud800")


def test_stored_truncation_and_padding_are_dropped(tmp_path, byte_level_backend):
    stored = type(byte_level_backend).from_str(byte_level_backend.to_str())
    stored.enable_truncation(3)
    stored.enable_padding(length=8)
    save(tmp_path, stored)
    text = string.ascii_letters
    assert len(load_tokenizer(tmp_path).encode(text)) == len(byte_level_backend.encode(text).ids) > 3


@pytest.mark.parametrize("backend_adds", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_is_added_once_and_only_when_asked(byte_level_backend, add_bos, backend_adds):
    backend = type(byte_level_backend).from_str(byte_level_backend.to_str())
    if backend_adds:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(TokenizerContents(backend=backend, bos_id=0, add_bos=add_bos))
    plain = tokenizer.encode("Paris", add_special_tokens=False)
    assert plain[0] != 0
    assert tokenizer.encode("Paris") == ([0, *plain] if add_bos or backend_adds else plain)


def test_folder(tmp_path, byte_level_backend):
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    }
    save(tmp_path, byte_level_backend, config, generation_config={"eos_token_id": [2, 1]}, config={"eos_token_id": 7})
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.chat_template) == (0, {1, 2}, "D")
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.named_templates == {"tool_use": "T"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from JSON"}))
    assert load_tokenizer(tmp_path).chat_template == "from JSON"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "from the file"
    assert tokenizer.named_templates == {"tool_use": "T", "rag": "R"}


def test_a_bos_that_is_written_in_the_text_is_not_doubled(byte_level_backend):
    for add_bos in (False, True):
        backend = type(byte_level_backend).from_str(byte_level_backend.to_str())
        if not add_bos:
            backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = Tokenizer(TokenizerContents(backend=backend, bos_id=0, add_bos=add_bos))
        assert tokenizer.encode("<s>Paris") == tokenizer.encode("Paris")


def test_end_ids_without_a_generation_config(tmp_path, byte_level_backend):
    save(tmp_path, byte_level_backend, {"eos_token": "</s>"}, config={"eos_token_id": 2})
    assert load_tokenizer(tmp_path).eos_ids == {1, 2}


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"looked for tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"tokenizer\.model is no BPE model of SentencePiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "tiktoken.model")
    with pytest.raises(ConfigError, match=r"found only tiktoken\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="neither a model folder nor"):
        load_tokenizer(tmp_path / "tiktoken.model")
    with pytest.raises(ConfigError, match="neither a folder nor"):
        load_tokenizer(tmp_path / "nothing")


def test_broken_files_are_named(tmp_path, byte_level_backend):
    save(tmp_path, byte_level_backend)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="tokenizer_config"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
