"""Builds a tokenizer from the metadata of a GGUF file.

Three kinds are known: byte-level BPE ("gpt2"), whose files name a pre-tokenizer and leave its rules to the reader
(`_PRE_TOKENIZERS` holds those we know), SentencePiece's BPE ("llama"), whose files hold a score for each piece, and
WordPiece ("bert"), whose files mark the pieces that begin a word.
Knows nothing of the file's layout or tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from hornbeam.core.errors import ConfigError
from hornbeam.text.formats.contents import TokenizerContents
from hornbeam.text.formats.sentencepiece import (
    CONTROL,
    NORMAL,
    SPACE,
    SentencePieces,
    add_tokens,
    sentencepiece_backend,
)

# How text splits into words: contractions, letters, numbers (as filled in), punctuation, line ends, spaces
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The same where a capital letter begins a word: capitals then small letters, with (as filled in) a contraction
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(contraction)s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(contraction)s"
    r"|%(number)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Template variable -> metadata entry that holds the token's id
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "sep_token": "seperator_token_id",  # so it is spelt there
}
_NAMED_TEMPLATE = "tokenizer.chat_template."
_EOS_ENTRIES = ("eos_token_id", "eot_token_id", "eom_token_id")  # end of sequence, of turn, of message


# Metadata entry behind "tokenizer." -> type of its value, or of its list's elements
_SINGLE = {"chat_template": str, "ggml.model": str, "ggml.pre": str} | {
    f"ggml.{entry}": int for entry in (*_SPECIAL_TOKENS.values(), *_EOS_ENTRIES)
}
_LISTS: dict[str, type | tuple[type, ...]] = {
    "ggml.tokens": str,
    "ggml.merges": str,
    "ggml.scores": (int, float),
    "ggml.token_type": int,
    "chat_templates": str,
}


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


def _split_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PLAIN = _PreTokenizer(build=_byte_level)
_DIGITS = _PreTokenizer(build=_digits_then_byte_level)
_THREE_DIGITS = _PreTokenizer(build=lambda: _split_words(_WORDS % r"\p{N}{1,3}"))
_THREE_DIGITS_WHOLE = replace(_THREE_DIGITS, ignore_merges=True, add_bos=True)
_ONE_DIGIT = _PreTokenizer(build=lambda: _split_words(_WORDS % r"\p{N}"), nfc=True)
_CASED = _PreTokenizer(
    build=lambda: _split_words(_CASED_WORDS % {"contraction": f"{_CONTRACTION}?", "number": r"\p{N}{1,3}"})
)
_CASED_ONE_DIGIT_WHOLE = _PreTokenizer(
    build=lambda: _split_words(_CASED_WORDS % {"contraction": "", "number": r"\p{N}"}), ignore_merges=True, add_bos=True
)
_PRE_TOKENIZERS = {
    "default": _PLAIN,
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "olmo": _PLAIN,
    "exaone4": _PLAIN,
    "a.x-4.0": _PLAIN,
    "mellum": _PLAIN,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "command-r": _DIGITS,
    "minerva-7b": _DIGITS,
    "dbrx": _THREE_DIGITS,
    "smaug-bpe": _THREE_DIGITS,
    "chatglm-bpe": _THREE_DIGITS,
    "glm4": _THREE_DIGITS,
    "llama3": _THREE_DIGITS_WHOLE,
    "llama-v3": _THREE_DIGITS_WHOLE,
    "llama-bpe": _THREE_DIGITS_WHOLE,
    "falcon3": _THREE_DIGITS_WHOLE,
    "pixtral": _THREE_DIGITS_WHOLE,
    "lfm2": _THREE_DIGITS_WHOLE,
    "qwen2": _ONE_DIGIT,
    "megrez": _ONE_DIGIT,
    "stablelm2": replace(_ONE_DIGIT, nfc=False),
    "deepseek-r1-qwen": _ONE_DIGIT,
    "gpt-4o": _CASED,
    "llama4": _CASED,
    "tekken": _CASED_ONE_DIGIT_WHOLE,
}


def read_metadata(metadata: Mapping[str, Any]) -> TokenizerContents:
    """Build the tokenizer that a GGUF file's metadata describes.

    Raises:
        ConfigError: an entry is missing or of a wrong type, or names a tokenizer model or pre-tokenizer that is not
            implemented.
    """
    _check_types(metadata)
    model = _required(metadata, "model")
    if model not in ("gpt2", "llama", "bert"):
        raise ConfigError(
            f"GGUF tokenizer model {model!r} is not supported; 'gpt2' (byte-level BPE), 'llama' (SentencePiece) and "
            "'bert' (WordPiece) are"
        )
    tokens = [str(token) for token in _required(metadata, "tokens")]
    special_ids = {name: _token_id(metadata, entry, tokens) for name, entry in _SPECIAL_TOKENS.items()}
    eos_ids = (_token_id(metadata, entry, tokens) for entry in _EOS_ENTRIES)
    if model == "gpt2":
        pre = _pre_tokenizer(metadata)
        backend, add_bos = _byte_level_backend(metadata, tokens, pre), pre.add_bos
    elif model == "llama":
        backend, add_bos = _sentencepiece_backend(metadata, tokens, special_ids["unk_token"]), True
    else:
        backend, add_bos = _wordpiece_backend(metadata, tokens, special_ids), False
    return TokenizerContents(
        backend=backend,
        special_tokens={name: tokens[token_id] for name, token_id in special_ids.items() if token_id is not None},
        bos_id=special_ids["bos_token"],
        eos_ids=frozenset(token_id for token_id in eos_ids if token_id is not None),
        add_bos=add_bos if model == "bert" else bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        chat_template=metadata.get("tokenizer.chat_template"),
        named_templates={
            key.removeprefix(_NAMED_TEMPLATE): text for key, text in metadata.items() if key.startswith(_NAMED_TEMPLATE)
        },
    )


def _check_types(metadata: Mapping[str, Any]) -> None:
    for name, value in metadata.items():
        entry = name.removeprefix("tokenizer.")
        single = _SINGLE.get(entry, str if entry.startswith("chat_template.") else object)
        if entry in _LISTS:
            right = isinstance(value, list) and all(isinstance(element, _LISTS[entry]) for element in value)
        else:
            right = isinstance(value, single)
        if not right:
            raise ConfigError(f"the GGUF file's {name} is of a wrong type; fetch or convert it again")


def _pre_tokenizer(metadata: Mapping[str, Any]) -> _PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise ConfigError(f"GGUF pre-tokenizer {name!r} is not known; known are: {', '.join(_PRE_TOKENIZERS)}")
    return _PRE_TOKENIZERS[name]


def _byte_level_backend(metadata: Mapping[str, Any], tokens: list[str], pre: _PreTokenizer) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = (merge.partition(" ") for merge in _required(metadata, "merges"))
    try:
        model = models.BPE(
            vocab=vocabulary, merges=[(left, right) for left, _, right in pairs], ignore_merges=pre.ignore_merges
        )
    except Exception as error:  # the library raises bare Exception for merges that the vocabulary lacks
        raise ConfigError(f"the GGUF file's vocabulary and merges do not fit together: {error}") from error
    backend = Tokenizer(model)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    return _with_added_tokens(backend, metadata, tokens)


def _sentencepiece_backend(metadata: Mapping[str, Any], tokens: list[str], unknown_id: int | None) -> Tokenizer:
    """One space goes in front of a text unless the file says no."""
    scores = _required(metadata, "scores")
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not len(tokens) == len(scores) == len(kinds):
        raise ConfigError("the GGUF file's tokens, scores and token types differ in number")
    pieces = SentencePieces(
        tokens=tokens,
        scores=scores,
        kinds=kinds,
        unknown_id=unknown_id,
        space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )
    return _with_added_tokens(sentencepiece_backend(pieces), metadata, tokens)


def _wordpiece_backend(
    metadata: Mapping[str, Any], tokens: list[str], special_ids: Mapping[str, int | None]
) -> Tokenizer:
    """Words in lower case without accents, cut into the longest pieces; a text stands between CLS and SEP."""
    unknown, end = special_ids["unk_token"], special_ids["sep_token"]
    start = special_ids["cls_token"] if special_ids["cls_token"] is not None else special_ids["bos_token"]
    if unknown is None or start is None or end is None:
        raise ConfigError("the GGUF file's WordPiece tokenizer lacks the id of its unknown, CLS or SEP token")
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    special = {token for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL} | {tokens[unknown]}
    pieces = [token if token in special else token[1:] if token.startswith(SPACE) else f"##{token}" for token in tokens]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens[unknown]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    framed = f"{tokens[start]} $A {tokens[end]}"
    backend.post_processor = processors.TemplateProcessing(
        single=framed, special_tokens=[(tokens[start], start), (tokens[end], end)]
    )
    return _with_added_tokens(backend, metadata, tokens)


def _with_added_tokens(backend: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    return add_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type", []))


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
