"""Builds a tokenizer from the metadata of a GGUF file.

Such a file names its pre-tokenizer and leaves the rules to the reader; `_PRE_TOKENIZERS` holds those we know.
Only byte-level BPE so far ("gpt2"). Knows nothing of the file's layout or tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hornbeam.core.errors import ConfigError
from hornbeam.text.formats.contents import TokenizerContents

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

# How text splits into words: contractions, letters, numbers (as filled in), punctuation, line ends, spaces
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Template variable -> metadata entry that holds the token's id
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_EOS_ENTRIES = ("eos_token_id", "eot_token_id", "eom_token_id")  # end of sequence, of turn, of message


@dataclass(frozen=True, slots=True, kw_only=True)
class _PreTokenizer:
    """One value of tokenizer.ggml.pre."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False  # a word that is a token is taken whole
    nfc: bool = False  # Unicode is composed first
    add_bos: bool = False  # where the file does not say


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split_words(number: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS % number), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS = {
    "default": _PreTokenizer(build=_byte_level),
    "gpt-2": _PreTokenizer(build=_byte_level),
    "smollm": _PreTokenizer(build=_digits_then_byte_level),
    "llama-bpe": _PreTokenizer(build=lambda: _split_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True),
    "qwen2": _PreTokenizer(build=lambda: _split_words(r"\p{N}"), nfc=True),
}


def read_metadata(metadata: Mapping[str, Any]) -> TokenizerContents:
    """Build the tokenizer that a GGUF file's metadata describes.

    Raises:
        ConfigError: an entry is missing, or names a tokenizer model or pre-tokenizer that is not implemented.
    """
    pre = _pre_tokenizer(metadata)
    tokens = [str(token) for token in _required(metadata, "tokens")]
    special_ids = {name: _token_id(metadata, entry, tokens) for name, entry in _SPECIAL_TOKENS.items()}
    eos_ids = (_token_id(metadata, entry, tokens) for entry in _EOS_ENTRIES)
    return TokenizerContents(
        backend=_backend(metadata, tokens, pre),
        special_tokens={name: tokens[token_id] for name, token_id in special_ids.items() if token_id is not None},
        bos_id=special_ids["bos_token"],
        eos_ids=frozenset(token_id for token_id in eos_ids if token_id is not None),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos)),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _pre_tokenizer(metadata: Mapping[str, Any]) -> _PreTokenizer:
    model = _required(metadata, "model")
    if model != "gpt2":
        raise ConfigError(f"GGUF tokenizer model {model!r} is not supported, only 'gpt2' (byte-level BPE) is")
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise ConfigError(f"GGUF pre-tokenizer {name!r} is not known; known are: {', '.join(_PRE_TOKENIZERS)}")
    return _PRE_TOKENIZERS[name]


def _backend(metadata: Mapping[str, Any], tokens: list[str], pre: _PreTokenizer) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = (merge.split(" ", 1) for merge in _required(metadata, "merges"))
    try:
        model = models.BPE(
            vocab=vocabulary, merges=[(left, right) for left, right in pairs], ignore_merges=pre.ignore_merges
        )
    except Exception as error:  # the library raises bare Exception for merges that the vocabulary lacks
        raise ConfigError(f"the GGUF file's vocabulary and merges do not fit together: {error}") from error
    backend = Tokenizer(model)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", ())
    backend.add_special_tokens(_added_tokens(tokens, types, _CONTROL, special=True))
    backend.add_tokens(_added_tokens(tokens, types, _USER_DEFINED, special=False))
    return backend


def _added_tokens(tokens: list[str], types: Any, kind: int, *, special: bool) -> list[AddedToken | str]:
    added = (token for token, token_type in zip(tokens, types, strict=False) if token_type == kind)
    return [AddedToken(token, special=special, normalized=False) for token in added]


def _required(metadata: Mapping[str, Any], entry: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{entry}")
    if value is None:
        raise ConfigError(f"the GGUF file has no tokenizer: its metadata lacks tokenizer.ggml.{entry}")
    return value


def _token_id(metadata: Mapping[str, Any], entry: str, tokens: list[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{entry}")
    if value is None:
        return None
    if not 0 <= value < len(tokens):
        raise ConfigError(f"tokenizer.ggml.{entry} is {value}, but the GGUF file has {len(tokens)} tokens")
    return int(value)
