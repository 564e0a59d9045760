"""Renders a chat into a prompt with the model's Jinja template, in a sandbox.

Offers what templates written for Hugging Face expect: `raise_exception`, `strftime_now`, a `tojson` that leaves
characters as they are, loop controls, and `{% generation %}` as a mere bracket. Knows no model and no tokens.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hornbeam.core.errors import BadRequest, ConfigError

_CUT = "\ue000continue here\ue001"  # private-use characters around it: no template reacts to them


class ChatTemplate:
    """A chat template, compiled at its first use.

    Args:
        source: Jinja source; None for a model that has no template, which makes `render` refuse.
        special_tokens: variables for the template ("bos_token", ...).
        tool_source: used instead where tools are given, if there is one.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        self._source = source
        self._special_tokens = special_tokens
        self._tool_source = tool_source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`.

        Args:
            messages: as in the OpenAI API. A content that is a list of text parts becomes their texts, joined by
                nothing: the parts carry their own spacing.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: as in the OpenAI API.
            continue_final_message: end inside the last message, right behind its content, for the model to go on
                with; no generation prompt then.
            kwargs: further variables for the template.

        Raises:
            BadRequest: there is no template, it cannot render these messages, or a content part is not text.
        """
        source = self._tool_source if tools and self._tool_source is not None else self._source
        if source is None:
            raise BadRequest(
                "this model has no chat template: start the server with --chat-template, or send the finished prompt "
                "to /generate"
            )
        plain = [_with_plain_content(message) for message in messages]
        if continue_final_message:
            if not plain or not isinstance(plain[-1].get("content"), str):
                raise BadRequest("continue_final_message needs a last message with text content", "messages")
            plain[-1]["content"] += _CUT
        variables = {**self._special_tokens, **kwargs, "messages": plain, "tools": tools}
        try:
            prompt = _compiled(source).render(
                variables, add_generation_prompt=add_generation_prompt and not continue_final_message
            )
        except Exception as error:  # the template is a program of its own: whatever it raises is its answer
            raise BadRequest(f"the chat template cannot render these messages: {error}", "messages") from error
        if not continue_final_message:
            return prompt
        before, cut, _ = prompt.rpartition(_CUT)
        if not cut:
            raise BadRequest("the chat template drops the last message, so it cannot be continued", "messages")
        return before


def check_template(source: str) -> None:
    """Raises ConfigError if `source` is no Jinja template."""
    try:
        _compiled(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template is broken: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    # The sandbox forbids private attributes, changes to the messages, and ranges over 100,000.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the tag by what stands inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _with_plain_content(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": "".join(_part_text(part) for part in content)}


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise BadRequest(f"content part of type {kind!r} is not supported: only 'text' is", "messages")
    if not isinstance(part.get("text"), str):
        raise BadRequest("content part of type 'text' needs a string 'text'", "messages")
    return str(part["text"])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
