"""Reads the tokenizer of a Hugging Face model folder.

Knows the files `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
`config.json` and `chat_template.jinja`. Slow tokenizers (SentencePiece models, Python code) are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from hornbeam.core.errors import ConfigError
from hornbeam.text.formats.contents import TokenizerContents

_BACKEND_FILE = "tokenizer.json"


def read_folder(folder: Path) -> TokenizerContents:
    """Read the tokenizer of a model folder.

    The end-of-sequence ids are the tokenizer's own and those of the generation config (without one, of the model's).

    Raises:
        ConfigError: `tokenizer.json` is missing, or a file cannot be understood.
    """
    backend_path = folder / _BACKEND_FILE
    if not backend_path.is_file():
        raise ConfigError(_missing(folder))
    try:
        backend = tokenizers.Tokenizer.from_file(str(backend_path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise ConfigError(f"cannot read {backend_path}: {error}") from error
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json")) | _special_tokens(config)
    bos_id, eos_id = (
        backend.token_to_id(special_tokens[name]) if name in special_tokens else None
        for name in ("bos_token", "eos_token")
    )
    return TokenizerContents(
        backend=backend,
        special_tokens=special_tokens,
        bos_id=bos_id,
        eos_ids=_generation_eos_ids(folder) | ({eos_id} if eos_id is not None else set()),
        # Some models state BOS here and leave it out of tokenizer.json. Otherwise tokenizer.json decides, as it does
        # in transformers.
        add_bos=config.get("add_bos_token") is True,
        chat_template=_chat_template(folder, config),
    )


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"no tokenizer: {folder} is neither a folder nor a GGUF file"
    slow = [name for name in ("tokenizer.model", "vocab.json", "tiktoken.model") if (folder / name).is_file()]
    found = f"; found only {', '.join(slow)}, convert it with transformers' AutoTokenizer and save_pretrained"
    return f"no tokenizer in {folder}: looked for {_BACKEND_FILE}" + (found if slow else "")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"cannot read {path}: it must hold a JSON object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries `<name>_token`; each is a string or a described token."""
    described = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in described.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _generation_eos_ids(folder: Path) -> frozenset[int]:
    for file in ("generation_config.json", "config.json"):
        eos = _read_json(folder / file).get("eos_token_id")
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template file, else the config's entry; of several named templates the default, else the first."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    return template
