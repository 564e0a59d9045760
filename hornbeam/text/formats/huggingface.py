"""Reads the tokenizer of a Hugging Face model folder.

Knows the files `tokenizer.json` (without one, SentencePiece's `tokenizer.model`), `tokenizer_config.json`,
`special_tokens_map.json`, `generation_config.json`, `config.json`, `chat_template.jinja`, `chat_template.json` and
those in `additional_chat_templates/`. Tokenizers that are Python code are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from hornbeam.core.errors import ConfigError
from hornbeam.text.formats.contents import TokenizerContents
from hornbeam.text.formats.sentencepiece import read_sentencepiece

_BACKEND_FILE, _SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
_CONFIG_FILE = "tokenizer_config.json"
_DEFAULT_TEMPLATE = "default"
_GENERAL_CLASSES = (None, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_CLASSES_WITHOUT_BOS = (  # which heed tokenizer.json alone
    *_GENERAL_CLASSES[1:],
    *("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast"),
)


def read_folder(folder: Path) -> TokenizerContents:
    """Read the tokenizer of a model folder.

    The end-of-sequence ids are the tokenizer's own and those of the generation config (without one, of the model's).

    Raises:
        ConfigError: `tokenizer.json` is missing, or a file cannot be understood.
    """
    config = _read_json(folder / _CONFIG_FILE)
    special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json")) | _special_tokens(config)
    backend = _read_backend(folder, config)
    try:
        _add_tokens(backend, config, [*special_tokens.values(), *_unnamed_special_tokens(config)])
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read added_tokens_decoder in {folder / _CONFIG_FILE}: {error}") from error
    bos_id, eos_id = (
        backend.token_to_id(special_tokens[name]) if name in special_tokens else None
        for name in ("bos_token", "eos_token")
    )
    templates = _chat_templates(folder, config)
    return TokenizerContents(
        backend=backend,
        special_tokens=special_tokens,
        bos_id=bos_id,
        eos_ids=_generation_eos_ids(folder) | ({eos_id} if eos_id is not None else set()),
        # Some models state BOS here and leave it out of tokenizer.json, which decides for the others.
        add_bos=config.get("add_bos_token", not (folder / _BACKEND_FILE).is_file()) is True
        and config.get("tokenizer_class") not in _CLASSES_WITHOUT_BOS,
        chat_template=templates.pop(_DEFAULT_TEMPLATE, next(iter(templates.values()), None)),
        named_templates=templates,
    )


def _read_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path = folder / _BACKEND_FILE
    if not path.is_file() and (folder / _SENTENCEPIECE_FILE).is_file():
        return read_sentencepiece(folder / _SENTENCEPIECE_FILE)
    if not path.is_file():
        raise ConfigError(_missing(folder))
    try:
        return _with_prefix_space(tokenizers.Tokenizer.from_file(str(path)), config)
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise ConfigError(f"cannot read {path}: {error}; download it again") from error


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"no tokenizer: {folder} is neither a folder nor a GGUF file"
    slow = [name for name in ("vocab.json", "tiktoken.model") if (folder / name).is_file()]
    found = f"; found only {', '.join(slow)}, convert it with transformers' AutoTokenizer and save_pretrained"
    return f"no tokenizer in {folder}: looked for {_BACKEND_FILE}" + (found if slow else "")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"cannot read {path}: it must hold a JSON object; download it again")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The entries `<name>_token`, and those named in `extra_special_tokens`; each is a string or a described token."""
    described = {name: value for name, value in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    described |= extra if isinstance(extra, dict) else {}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in described.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _with_prefix_space(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """`add_prefix_space` as transformers' classes for single kinds of tokenizers obey it; the general one does not."""
    wanted = config.get("add_prefix_space")
    if not isinstance(wanted, bool) or config.get("tokenizer_class") in _GENERAL_CLASSES:
        return backend
    state = json.loads(backend.to_str())
    splitters, normalizers = state["pre_tokenizer"] or {}, state["normalizer"] or {}
    for step in splitters.get("pretokenizers", [splitters]):
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = wanted
        elif step.get("type") == "Metaspace" and not wanted:
            step["prepend_scheme"] = "never"
    for step in normalizers.get("normalizers", [normalizers]):
        if step.get("type") == "Prepend" and not wanted:
            step["prepend"] = ""
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _unnamed_special_tokens(config: Mapping[str, Any]) -> list[str]:
    lists = (config.get(name) for name in ("additional_special_tokens", "extra_special_tokens"))
    tokens = [token for entry in lists if isinstance(entry, list) for token in entry]
    return list(_special_tokens({f"{i}_token": token for i, token in enumerate(tokens)}).values())


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: list[str]) -> None:
    """What the config describes beyond tokenizer.json, or otherwise, and special tokens that are plain words there."""
    described = {
        int(token_id): AddedToken(**{name: value for name, value in entry.items() if name != "__type"})
        for token_id, entry in (config.get("added_tokens_decoder") or {}).items()
    }
    known = backend.get_added_tokens_decoder()
    added = [token for token_id, token in sorted(described.items()) if repr(known.get(token_id)) != repr(token)]
    contents = {token.content for token in (*known.values(), *added)}
    added += [
        AddedToken(text, special=True, normalized=False)
        for text in dict.fromkeys(special_tokens)
        if text not in contents
    ]
    backend.add_tokens(added)


def _generation_eos_ids(folder: Path) -> frozenset[int]:
    for file in ("generation_config.json", "config.json"):
        eos = _read_json(folder / file).get("eos_token_id")
        if eos is not None:
            ids = eos if isinstance(eos, list) else [eos]
            if not all(isinstance(token_id, int) for token_id in ids):
                raise ConfigError(f"eos_token_id in {folder / file} must be a token id or a list of such, not {eos!r}")
            return frozenset(ids)
    return frozenset()


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name, the default one as "default". Files of their own win over entries of the config."""
    named: dict[Any, Any] = {}
    for entry in (config.get("chat_template"), _read_json(folder / "chat_template.json").get("chat_template")):
        if isinstance(entry, list):
            named |= {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        elif entry is not None:
            named[_DEFAULT_TEMPLATE] = entry
    for path in (*sorted(folder.glob("additional_chat_templates/*.jinja")), folder / "chat_template.jinja"):
        if path.is_file():
            named[_DEFAULT_TEMPLATE if path.parent == folder else path.stem] = _read_text(path)
    if not all(isinstance(text, str) for item in named.items() for text in item):
        raise ConfigError(f"a chat template in {folder} is no text; download it again")
    return named


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; download it again") from error
