"""The same folder, read by us and by transformers."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from hornbeam.text.chat import ChatTemplate
from hornbeam.text.loading import load_tokenizer
from hornbeam.text.session import TextOptions, TextSession

pytestmark = pytest.mark.cpu

TEMPLATE = """{{- bos_token }}
{%- if tools is not none %}
    {{- '[tools]' + tools | tojson(indent=2) }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- '<|' + message.role + '|>' + message.content + eos_token }}
        {%- endgeneration %}
        {%- continue %}
    {%- endif %}
    {{- '<|' + message.role + '|>\n' + message.content | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
CHATS = [
    [{"role": "user", "content": " Hi <there> & größe 🙂 "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}],
    [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one, two,"}],
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_level_backend):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("model")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["The café in 東京 👩‍👩‍👧", "<s>Paris</s> two words", "", "  a\n\n b\t12345"])
def test_ids_and_text(folder, theirs, text):
    ours = load_tokenizer(folder)
    for add in (True, False):
        assert ours.encode(text, add_special_tokens=add) == theirs.encode(text, add_special_tokens=add)
    ids = ours.encode(text)
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == expected
        assert TextSession(ours, TextOptions(skip_special_tokens=skip)).feed(ids, True).text == expected


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", CHATS)
def test_prompts(folder, theirs, messages, tools):
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    for add in (True, False):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=add)
        assert template.render(messages, tools=tools, add_generation_prompt=add) == expected
    expected = theirs.apply_chat_template(CHATS[-1], tokenize=False, continue_final_message=True)
    assert template.render(CHATS[-1], continue_final_message=True) == expected


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("add_bos", [False, True, None])
def test_bos(tmp_path, byte_level_backend, add_bos, in_file):
    transformers = pytest.importorskip("transformers")
    backend = type(byte_level_backend).from_str(byte_level_backend.to_str())
    frame = "<s> $A" if in_file else "$A"
    backend.post_processor = TemplateProcessing(single=frame, special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("Paris") == theirs.encode("Paris")


def test_facts(folder, theirs):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == len(theirs)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (theirs.bos_token_id, {theirs.eos_token_id})
    assert tokenizer.special_ids == set(theirs.all_special_ids) | {2}
    assert tokenizer.special_tokens == theirs.special_tokens_map


def added(content, special, **changes):
    shape = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | changes
    return {"content": content, "special": special, **shape}


@pytest.mark.parametrize(
    "config",
    [
        {"additional_special_tokens": ["<|tool|>", "<|end|>"]},
        {"extra_special_tokens": ["<|tool|>", "<|end|>"]},
        {"extra_special_tokens": {"tool_token": "<|tool|>", "end_token": "<|end|>"}},
    ],
)
def test_further_special_tokens(tmp_path, byte_level_backend, config):
    from transformers import AutoTokenizer

    byte_level_backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": CLASS, "eos_token": "</s>"} | config)
    )
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.encode("a<|tool|> b<|end|>")
    assert ours.encode("a<|tool|> b<|end|>") == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a b"
    assert ours.special_tokens == theirs.special_tokens_map


def test_tokens_that_only_the_config_describes(tmp_path, byte_level_backend):
    from transformers import AutoTokenizer

    byte_level_backend.save(str(tmp_path / "tokenizer.json"))
    size = byte_level_backend.get_vocab_size()
    described = {size: added("<|call|>", True), size + 1: added("<tool>", False, lstrip=True), 2: added("</s>", True)}
    config = {"added_tokens_decoder": described, "eos_token": "</s>", "bos_token": "he", "tokenizer_class": CLASS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "a <tool>b<|call|> he</s>"
    assert ours.encode(text) == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ours.encode(text), skip) == theirs.decode(theirs.encode(text), skip_special_tokens=skip)


CLASS = "PreTrainedTokenizerFast"
PIECES = ["<unk>", "<s>", "</s>", "\u2581", "h", "i", "\u2581h", "hi", "\u2581hi"]


def sentencepiece(prepends):
    merges = [("\u2581", "h"), ("h", "i"), ("\u2581h", "i")]
    vocabulary = {piece: token_id for token_id, piece in enumerate(PIECES)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


@pytest.mark.parametrize("prefix", [{}, {"add_prefix_space": True}, {"add_prefix_space": False}])
@pytest.mark.parametrize("kind", ["prepend", "metaspace", "byte_level"])
@pytest.mark.parametrize("general", [True, False])
def test_spaces_in_front_of_texts(tmp_path, byte_level_backend, prefix, kind, general):
    from transformers import AutoTokenizer

    byte_level = kind == "byte_level"
    backend = byte_level_backend if byte_level else sentencepiece(kind == "prepend")
    backend.save(str(tmp_path / "tokenizer.json"))
    own = "GPT2Tokenizer" if byte_level else "LlamaTokenizerFast"
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>" if byte_level else "<unk>"}
    config = {**special, **prefix, "tokenizer_class": CLASS if general else own}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hi hi", "hihi"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
