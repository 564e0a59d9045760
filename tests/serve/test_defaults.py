import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from hornbeam.core.errors import BadRequest, ConfigError
from hornbeam.serve.defaults import choose_template, sampling_defaults
from hornbeam.serve.openai import parse_chat
from hornbeam.text.formats.contents import TokenizerContents
from hornbeam.text.tokenizer import Tokenizer

pytestmark = pytest.mark.pure

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def tokenizer(default="plain {{ messages[0].content }}", **named):
    contents = TokenizerContents(backend=Backend(models.BPE()), chat_template=default, named_templates=named)
    return Tokenizer(contents)


def test_numbers_of_the_generation_config():
    config = {"temperature": 0.6, "top_k": 0, "top_p": None, "do_sample": True, "eos_token_id": 2}
    assert sampling_defaults(config) == {"temperature": 0.6, "top_k": -1}
    assert sampling_defaults({}) == {}


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 2.0}, {"top_k": 1.5}, {"temperature": True}])
def test_numbers_that_cannot_be(wrong):
    with pytest.raises(
        ConfigError, match=rf"generation_config\.json says {next(iter(wrong))}.*--sampling-defaults openai"
    ):
        sampling_defaults(wrong)


def test_the_models_own_templates():
    own = tokenizer(tool_use="tools {{ tools | length }}", rag="rag")
    template = choose_template(own, None, None)
    assert template.render(MESSAGES) == "plain Hi"
    assert template.render(MESSAGES, tools=[]) == "plain Hi"
    assert template.render(MESSAGES, tools=TOOLS) == "tools 1"
    assert choose_template(own, None, "rag").render(MESSAGES, tools=TOOLS) == "rag"
    with pytest.raises(ConfigError, match="no chat template 'unheard'; it has: default, tool_use, rag"):
        choose_template(own, None, "unheard")
    with pytest.raises(BadRequest, match="no chat template"):
        choose_template(tokenizer(default=None), None, None).render(MESSAGES)


def test_a_template_of_the_users(tmp_path):
    (tmp_path / "t.jinja").write_text("file")
    (tmp_path / "t.json").write_text(json.dumps({"chat_template": "json"}))
    for name, expected in {"t.jinja": "file", "t.json": "json"}.items():
        template = choose_template(tokenizer(tool_use="tools"), str(tmp_path / name), None)
        assert template.render(MESSAGES, tools=TOOLS) == expected


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jinja", b"{% if %}", "template is broken"),
        ("t.jinja", b"\xff", "cannot be read"),
        ("t.json", b"{", "cannot be read"),
        ("t.json", b"{}", "cannot be read"),
        ("t.json", b'{"chat_template": 1}', "as a text"),
        ("t.json", b"[]", "cannot be read"),
    ],
)
def test_broken_templates(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        choose_template(tokenizer(), str(tmp_path / name), None)


def test_a_broken_template_of_the_model_refuses_chats_only(caplog):
    template = choose_template(tokenizer("{% if %}"), None, None)
    assert "--chat-template FILE" in caplog.text
    with pytest.raises(BadRequest, match="cannot render"):
        template.render(MESSAGES)


def test_requests_come_before_the_model_and_the_model_before_the_api():
    options = SimpleNamespace(stream_interval=1, served_model_name="m")
    serving = SimpleNamespace(
        template=choose_template(tokenizer(), None, None), options=options, sampling_defaults={"temperature": 0.6}
    )

    def sampling(**fields):
        return parse_chat({"messages": MESSAGES, **fields}, serving).requests[0].sampling

    assert (sampling().temperature, sampling().top_p) == (0.6, 1.0)
    assert sampling(temperature=None).temperature == 0.6
    assert sampling(temperature=0.2, top_p=0.5).temperature == 0.2
