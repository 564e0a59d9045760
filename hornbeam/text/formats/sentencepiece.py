"""SentencePiece's BPE: what its pieces mean to a tokenizer, and the file `tokenizer.model` that holds them.

The file is a message of protocol buffers (sentencepiece_model.proto); only what is needed of it is read.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from hornbeam.core.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces, in GGUF files too
SPACE = "\u2581"  # how a space is written
_BPE = 2  # value of trainer_spec.model_type
_VARINT, _LONG, _BYTES, _SHORT = 0, 1, 2, 5  # protocol buffers' wire types
_CONVERT = "convert it with transformers' AutoTokenizer and save_pretrained"


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieces:
    """A vocabulary in the order of ids. The lists are of one length."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    unknown_id: int | None
    space_prefix: bool  # a text begins with a space


def sentencepiece_backend(pieces: SentencePieces) -> Tokenizer:
    """Spaces become part of the pieces, and bytes spell what no piece does."""
    of_text = {
        token: score
        for token, score, kind in zip(pieces.tokens, pieces.scores, pieces.kinds, strict=True)
        if kind in (NORMAL, USER_DEFINED)
    }
    model = models.BPE(
        vocab={token: token_id for token_id, token in enumerate(pieces.tokens)},
        merges=_merges(of_text),
        unk_token=None if pieces.unknown_id is None else pieces.tokens[pieces.unknown_id],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    spaces, steps = normalizers.Replace(" ", SPACE), [decoders.Replace(SPACE, " "), decoders.ByteFallback()]
    if pieces.space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        backend.decoder = decoders.Sequence([*steps, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = spaces
        backend.decoder = decoders.Sequence([*steps, decoders.Fuse()])
    return backend


def add_tokens(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """`backend`, where control tokens and users' own are found as a whole in texts."""
    of_kind = {
        wanted: [token for token, kind in zip(tokens, kinds, strict=False) if kind == wanted]
        for wanted in (CONTROL, USER_DEFINED)
    }
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of_kind[CONTROL]])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in of_kind[USER_DEFINED]])
    return backend


def read_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.model`.

    Raises:
        ConfigError: it is damaged, of another format, no BPE, or changes texts in other ways than by spaces.
    """
    try:
        pieces = _read_pieces(path.read_bytes())
        return add_tokens(sentencepiece_backend(pieces), pieces.tokens, pieces.kinds)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}; download it again") from error
    except Exception as error:  # the library raises bare Exception for pieces that do not fit together
        raise ConfigError(f"{path} is no BPE model of SentencePiece that is supported ({error}): {_CONVERT}") from error


def _read_pieces(data: bytes) -> SentencePieces:
    """Raises ValueError, or what a wrong type of a value raises, for other files."""
    tokens: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    settings: dict[int, Mapping[int, Any]] = {2: {}, 3: {}}  # of training, of normalization
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(value))
            tokens.append(piece[1].decode())
            scores.append(piece.get(2, 0.0))
            kinds.append(piece.get(3, NORMAL))
        elif field in settings:
            settings[field] = dict(_fields(value))
    training, normalization = settings[2], settings[3]
    if training.get(3, 1) != _BPE or len(set(tokens)) != len(tokens) or not tokens:
        raise ValueError("its pieces are not those of BPE")
    if normalization.get(2) or normalization.get(4, 1):
        raise ValueError("it normalizes texts")
    unknown = next((token_id for token_id, kind in enumerate(kinds) if kind == UNKNOWN), None)
    return SentencePieces(
        tokens=tokens, scores=scores, kinds=kinds, unknown_id=unknown, space_prefix=bool(normalization.get(3, 1))
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an int, a float, or the bytes of what is longer."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(data, position)
        elif wire_type in (_LONG, _SHORT):
            size = 8 if wire_type == _LONG else 4
        else:
            raise ValueError("it is no such file")
        field = data[position : position + size]
        if len(field) != size:
            raise ValueError("it is cut off")
        yield number, struct.unpack("<f", field)[0] if wire_type == _SHORT else field
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits a byte, and where it ends."""
    value = shift = 0
    while position < len(data) and shift < 64:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("it is cut off")


def _merges(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, by its score: SentencePiece joins the neighbours that score highest."""
    return [
        (left, right)
        for piece in sorted(pieces, key=pieces.__getitem__, reverse=True)
        for i in range(1, len(piece))
        if (left := piece[:i]) in pieces and (right := piece[i:]) in pieces
    ]
