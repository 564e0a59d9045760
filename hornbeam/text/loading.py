"""Finds the tokenizer that a model brings, and tries it. Knows where the formats' readers are, and no more of them."""

from pathlib import Path

from hornbeam.core.errors import ConfigError
from hornbeam.text.formats.gguf import read_metadata
from hornbeam.text.formats.huggingface import read_folder
from hornbeam.text.tokenizer import Tokenizer
from hornbeam.weights.gguf import read_gguf


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder or of a GGUF file.

    Raises:
        ConfigError: there is none, or it is of a kind that is not supported.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"no tokenizer: {path} is neither a model folder nor a .gguf file")
        return _tried(Tokenizer(read_metadata(read_gguf(path).metadata)), path)
    return _tried(Tokenizer(read_folder(path)), path)


def _tried(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """What the library finds wrong only when it encodes is told before anybody asks."""
    try:
        tokenizer.decode(tokenizer.encode("a b"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library panics, which is no Exception
        raise ConfigError(f"the tokenizer in {path} does not work: {error}; download it again") from error
    return tokenizer
