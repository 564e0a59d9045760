"""The terminal's conversation, with a server over the fake engine."""

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.serve import cli
from hornbeam.serve.chat import Chat, talk

pytestmark = pytest.mark.pure


def say(chat: Chat, lines: list, capsys) -> str:
    rest = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    talk(chat, read)
    return capsys.readouterr().out


def test_a_conversation_is_kept(server, capsys):
    chat = Chat(server.url, None, {"max_tokens": 3, "temperature": 0})
    assert "bcd\n" in say(chat, ["a"], capsys)
    assert [message["content"] for message in chat.messages] == ["a", "bcd"]
    assert "efg\n" in say(chat, ["", "/nonsense", KeyboardInterrupt, "/multi", "m", "d", "."], capsys)
    assert chat.messages[2]["content"] == "m\nd"


def test_reset_and_system(server, capsys):
    chat = Chat(f"{server.url}/v1", None, {"max_tokens": 3})
    say(chat, ["/system be brief", "a", "/reset", "/exit", "never read"], capsys)
    assert chat.messages == [{"role": "system", "content": "be brief"}]


def test_errors_do_not_end_it(server, capsys):
    chat = Chat(server.url, None, {"temperature": -1})
    assert "error: " in say(chat, ["a"], capsys)
    assert chat.messages == []


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(server):
    chat = Chat(server.url, None, {"max_tokens": 8})
    pieces = chat.ask("a")
    said = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}


def test_nobody_there(capsys):
    assert cli.main(["chat", "--url", "http://127.0.0.1:1"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be reached"):
        Chat("nonsense", None, {})
