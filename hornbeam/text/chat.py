"""Renders a chat into a prompt with the model's Jinja template, in a sandbox. Knows no model and no tokens."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.runtime import Context

from hornbeam.core.errors import BadRequest, ConfigError
from hornbeam.text.sandbox import compile_template

_MAX_TURNS = 1_000_000  # of all loops of one rendering
_TURNS = "hornbeam_turns"  # the variable that counts them
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
        variables = {**self._special_tokens, **kwargs, "messages": plain, "tools": tools, _TURNS: itertools.count(1)}
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
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
        raise ConfigError(f"the chat template is broken: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return compile_template(source, _counted)


@jinja2.pass_context
def _counted(context: Context, items: Any) -> Iterator[Any]:
    """The items of a loop; a template that never ends is stopped."""
    for item in items:
        if next(context[_TURNS]) > _MAX_TURNS:
            raise jinja2.TemplateError(f"more than {_MAX_TURNS} turns of its loops")
        yield item


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
