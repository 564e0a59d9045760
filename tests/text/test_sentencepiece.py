"""Models of SentencePiece, encoded here by hand; what their library makes of the same pieces is known."""

import json
import struct

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.text.loading import load_tokenizer

pytestmark = pytest.mark.pure

LETTERS = ["h", "e", "l", "o", "\u2581"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
JOINED = ["ll", "he", "\u2581he", "llo", "\u2581hello"]  # the earlier, the higher their score
BPE, IDENTITY = b"\x18\x02", b"\x20\x00"  # fields 3 of training, 4 of normalization


def field(number, data):
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def piece(token, score=0.0, kind=1):
    return field(1, field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))


def model(training=BPE, normalization=IDENTITY):
    pieces = [piece("<unk>", kind=2), piece("<s>", kind=3), piece("</s>", kind=3), *(piece(b, kind=6) for b in BYTES)]
    pieces += [piece(token, -float(i)) for i, token in enumerate(JOINED)] + [piece(token, -100.0) for token in LETTERS]
    return b"".join(pieces) + field(2, training) + field(3, normalization)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return tmp_path


def ids(*tokens):
    return [["<unk>", "<s>", "</s>", *BYTES, *JOINED, *LETTERS].index(token) for token in tokens]


def test_pieces_bytes_and_the_space_in_front(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hello") == ids("<s>", "\u2581hello")
    assert tokenizer.encode("hell", add_special_tokens=False) == ids("\u2581he", "ll")
    assert tokenizer.encode("é", add_special_tokens=False) == ids("\u2581", "<0xC3>", "<0xA9>")
    assert tokenizer.decode(tokenizer.encode(" hello é")) == " hello é"
    assert tokenizer.eos_ids == {2}


def test_what_the_files_say_otherwise(folder):
    (folder / "tokenizer.model").write_bytes(model(normalization=b"\x18\x00" + IDENTITY))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": False}))
    assert load_tokenizer(folder).encode("hello") == ids("he", "llo")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (model()[:-1], "cut off"),
        (model(training=b"\x18\x01"), "not those of BPE"),
        (model(normalization=b""), "normalizes texts"),
        (b"IQ== 0\nIg== 1\n", "no BPE model"),
        (b"{}", "no BPE model"),
    ],
)
def test_other_files_are_refused(folder, content, reason):
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"tokenizer\.model is no BPE model.*{reason}|{reason}"):
        load_tokenizer(folder)
