"""Text to token ids and back, over the `tokenizers` library.

Knows vocabularies, special tokens and the bytes of each token; nothing of chats, requests or streams.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hornbeam.core.errors import BadRequest
from hornbeam.text.formats.contents import TokenizerContents

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A vocabulary, how text is cut into it, and what its tokens stand for. Safe to share among threads."""

    def __init__(self, contents: TokenizerContents) -> None:
        self._backend = contents.backend
        self._backend.no_truncation()  # a file may have stored either; a prompt must arrive whole
        self._backend.no_padding()
        self._add_bos = contents.add_bos
        self._decoders = _decoder_types(self._backend.decoder)
        self._bytes: dict[int, bytes] = {}  # filled on demand; at most one entry per id a model can produce
        self.special_tokens: Mapping[str, str] = contents.special_tokens  # "bos_token" -> "<s>", for templates
        self.chat_template = contents.chat_template
        self.named_templates = contents.named_templates
        self.bos_id = contents.bos_id
        self.eos_ids = contents.eos_ids
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written in it become their ids.

        Args:
            add_special_tokens: frame the text as the model expects a bare prompt (BOS, for many models). A
                rendered chat template has its own.

        Raises:
            BadRequest: `text` is not valid Unicode (it holds half of a surrogate pair).
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise BadRequest("the text holds characters that are not valid Unicode (a lone surrogate)") from error
        if add_special_tokens and self.bos_id is not None:
            if self._add_bos and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
            elif ids[:2] == [self.bos_id] * 2:  # one of them was written in the text, as rendered chats have it
                del ids[0]
        return ids

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of `ids` on its own; ids outside the vocabulary have none.

        Args:
            skip_special_tokens: leave special tokens out.
            spaces_between_special_tokens: of the API; no decoder of this library puts spaces there, so both
                values give the same text.
        """
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text that it continues: UTF-8, maybe a part of a character.

        Concatenated over a sequence this is the sequence's text, leading space included. Ids outside the
        vocabulary (a model's padded rows) add nothing.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, each broken character as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if "ByteLevel" in self._decoders:
            alphabet = _byte_level_alphabet()
            if all(char in alphabet for char in token):
                return bytes(alphabet[char] for char in token)
            return token.encode()  # an added token, stored as plain text
        if "ByteFallback" in self._decoders and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        # Decoders may strip or add a space at the start, so ask for the token behind another one.
        before = self._backend.encode("a", add_special_tokens=False).ids[-1:]
        decode = functools.partial(self._backend.decode, skip_special_tokens=False)
        return decode([*before, token_id]).removeprefix(decode(before)).encode()


def _decoder_types(decoder: Any) -> frozenset[str]:
    """The type names of a `tokenizers` decoder and, if it is a sequence, of its steps."""
    if decoder is None:
        return frozenset()
    state = json.loads(decoder.__getstate__())
    return frozenset(step["type"] for step in [state, *state.get("decoders", ())])


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (GPT-2's table): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
