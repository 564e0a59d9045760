"""What a tokenizer file says, whatever its format. Each reader in this folder returns one `TokenizerContents`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerContents:
    """The pieces of a tokenizer, as read."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>", for chat templates
    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    add_bos: bool = False  # an encoded text starts with BOS, even where `backend` does not see to it
    chat_template: str | None = None
    named_templates: Mapping[str, str] = field(default_factory=dict)  # further ones: "tool_use", "rag", ...
