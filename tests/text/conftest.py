"""Tiny tokenizers, built here."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hornbeam.text.formats.contents import TokenizerContents
from hornbeam.text.tokenizer import Tokenizer

SENTENCES = [
    "The capital of France is Paris.",
    "A stop string may begin inside one token and end inside another.",
    "naïve café, größer, 東京タワー, Привет мир, 👩‍👩‍👧 and 🙂🙃",
]


@pytest.fixture(scope="session")
def byte_level_backend() -> tokenizers.Tokenizer:
    """Byte-level BPE of 300 tokens, so that most characters beyond ASCII are spread over several."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|end▁of▁turn|>"],
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_tokens(["two words", "Ġodd"])
    return backend


@pytest.fixture(scope="session")
def byte_level(byte_level_backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(TokenizerContents(backend=byte_level_backend, bos_id=0, eos_ids=frozenset({1})))


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """Pieces that carry their spaces in front, bytes for what they cannot spell; decoding strips one first space."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁end", "s", "a", "▁▁"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(TokenizerContents(backend=backend))
