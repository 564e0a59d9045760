"""`hornbeam chat`: a conversation in the terminal, with a server or with a model that is served for its sake.

Speaks the chat completions API, so any server that offers it will do. Standard library only.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from hornbeam.core.errors import ConfigError
from hornbeam.serve.cli import FlagParser, as_arguments

HELP = """/reset            forget the conversation
/system TEXT      set the system prompt, and forget the conversation
/multi            a message of several lines; a line with only a dot ends it
/help, /exit      (Ctrl-D ends, too; Ctrl-C stops an answer)"""
_READY = re.compile(r"The server is ready at (http://\S+)")
_TIMEOUT = 600.0  # seconds of silence


def main(argv: Sequence[str]) -> int:
    """`hornbeam chat`. Raises ConfigError if there is nobody to talk to."""
    parser = FlagParser("hornbeam chat", "A conversation in the terminal, with a server or with a model of yours.")
    parser.add_argument("--url", "--base-url", help="A running server, such as http://127.0.0.1:30000.")
    parser.add_argument("--system", metavar="TEXT", help="The system prompt.")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="Of an answer.")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token.")
    parser.add_flags()
    values = parser.parse_flags(argv)
    own = argparse.Namespace(**{name: values.pop(name) for name in ("url", "system", "max_tokens", "temperature")})
    sampling = {"max_tokens": own.max_tokens, "temperature": own.temperature}
    with _server(own.url, values) as url:
        chat = Chat(url, values["api_key"], {name: value for name, value in sampling.items() if value is not None})
        chat.reset(own.system)
        talk(chat, _read_line)
    return 0


class Chat:
    """A conversation. Raises ConfigError if the server at `url` cannot be asked for its model."""

    def __init__(self, url: str, api_key: str | None, sampling: dict[str, Any]) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._sampling = sampling
        self.messages: list[dict[str, str]] = []
        with self._open("/v1/models") as response:
            self.model: str = json.load(response)["data"][0]["id"]

    def reset(self, system: str | None = None) -> None:
        """Forget everything but `system`, or the system prompt there was."""
        if system is not None:
            self.messages = [{"role": "system", "content": system}]
        else:
            self.messages = [message for message in self.messages if message["role"] == "system"]

    def ask(self, text: str) -> Generator[str, None, None]:
        """The pieces of the answer. What was said of an answer that is cut off stays; one that fails is not kept.

        Raises:
            ConfigError: the server refuses, or cannot be reached.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": asked, "stream": True, **self._sampling}
        answer = ""
        try:
            with self._open("/v1/chat/completions", body) as response:
                for piece in _pieces(response):
                    answer += piece
                    yield piece
        finally:
            if answer:
                self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, self._headers)
            return urllib.request.urlopen(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                raise ConfigError(f"{self._url}{path} answers {error.code}: {_message(error.read())}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._url}{path} cannot be reached: {error}") from error


def talk(chat: Chat, read: Callable[[str], str]) -> None:
    """Read lines by `read(prompt)`, answer them, obey commands; until it raises EOFError."""
    _say(f"{chat.model}. /help tells the commands.\n")
    while True:
        try:
            line = read("> ").strip()
            if line == "/multi":
                line = "\n".join(iter(lambda: read(". "), "."))
        except KeyboardInterrupt:
            _say("\n")
            continue
        except EOFError:
            _say("\n")
            return
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                chat.reset()
            case "/system":
                chat.reset(rest)
            case _ if command.startswith("/"):
                _say(f"{HELP}\n")
            case _:
                _answer(chat, line)


def _answer(chat: Chat, line: str) -> None:
    try:
        with contextlib.closing(chat.ask(line)) as pieces:
            for piece in pieces:
                _say(piece)
    except KeyboardInterrupt:
        _say(" ...")
    except ConfigError as error:
        _say(f"error: {error}")
    _say("\n")


def _pieces(response: Any) -> Iterator[str]:
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        event = json.loads(data)
        if event.get("error"):
            raise ConfigError(_message(data))
        for choice in event["choices"]:
            delta = choice["delta"]
            if piece := (delta.get("reasoning_content") or "") + (delta.get("content") or ""):
                yield piece


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]


@contextlib.contextmanager
def _server(url: str | None, values: dict[str, Any]) -> Iterator[str]:
    """A server's URL: the one given, or that of one which is started with the flags, and ends with the chat."""
    if url is not None:
        yield url
        return
    command = [sys.executable, "-m", "hornbeam.launch_server", *as_arguments({**values, "port": 0}), "--log-level=info"]
    lines: deque[str] = deque(maxlen=200)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        try:
            _say("starting the model ...\n")
            for line in process.stderr:
                lines.append(line)
                if found := _READY.search(line):
                    break
            else:
                raise ConfigError(f"the server did not start:\n{''.join(list(lines)[-5:])}")
            threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True).start()  # or its pipe runs full
            yield found[1]
        finally:
            process.terminate()
            process.wait()


def _read_line(prompt: str) -> str:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and keys)
    return input(prompt)


def _say(text: str) -> None:
    print(text, end="", flush=True)  # noqa: T201
