"""What a model brings along for those who ask it: sampling numbers and chat templates.

Knows no engine and no HTTP.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hornbeam.core.errors import BadRequest, ConfigError
from hornbeam.core.request import SamplingParams
from hornbeam.text.chat import ChatTemplate, check_template
from hornbeam.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_SAMPLING_KEYS = ("min_p", "repetition_penalty", "temperature", "top_k", "top_p")
_TOOL_TEMPLATE = "tool_use"


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling numbers of a generation_config.json, by the names that requests have for them.

    Raises:
        ConfigError: one is no number, or out of its range.
    """
    get = generation_config.get
    given: dict[str, Any] = {name: get(name) for name in _SAMPLING_KEYS if get(name) is not None}
    if given.get("top_k") == 0:
        given["top_k"] = -1  # off
    for name, value in given.items():
        try:
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else (int, float)):
                raise BadRequest("must be a number", name)
            checked: dict[str, Any] = {name: value}
            SamplingParams(**checked)
        except BadRequest as error:
            raise ConfigError(
                f"the model's generation_config.json says {name} = {value!r}, which cannot be: {error}; mend it, or "
                "pass --sampling-defaults openai"
            ) from error
    if given:
        logger.info("sampling defaults of chats, by generation_config.json: %s", given)
    return given


def choose_template(tokenizer: Tokenizer, path: str | None, name: str | None) -> ChatTemplate:
    """The template in the file at `path`, else the model's own called `name`, else its default ones.

    Raises:
        ConfigError: the file cannot be read or is no template, or the model has none of this name.
    """
    special_tokens = tokenizer.special_tokens
    if path is not None:
        source = _read_template(Path(path))
        check_template(source)
        return ChatTemplate(source, special_tokens)
    own = {} if tokenizer.chat_template is None else {"default": tokenizer.chat_template}
    own |= tokenizer.named_templates
    if name is not None and name not in own:
        raise ConfigError(f"the model has no chat template {name!r}; it has: {', '.join(own) or 'none'}")
    for source in own.values():
        try:
            check_template(source)
        except ConfigError as error:  # texts can be continued all the same
            logger.warning("%s; chats will be refused, unless --chat-template FILE gives another one", error)
    if name is not None:
        return ChatTemplate(own[name], special_tokens)
    return ChatTemplate(own.get("default"), special_tokens, own.get(_TOOL_TEMPLATE))


def _read_template(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
        source = json.loads(text)["chat_template"] if path.suffix == ".json" else text
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error!r}") from error
    if not isinstance(source, str):
        raise ConfigError(f"--chat-template {path} must hold one template as a text")
    return source
