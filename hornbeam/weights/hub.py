"""Fetches a checkpoint from the Hugging Face hub, by way of the official client.

That client's cache, token, endpoint and offline mode apply (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE), and it
draws the progress. Knows which files a checkpoint of each format is made of, not what is in them.
"""

import re
from pathlib import Path

from hornbeam.core.errors import ConfigError
from hornbeam.weights.gguf import split_paths

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REPO_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")
_TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model")  # configs, tokenizers and chat templates
_SAFETENSORS, _TORCH, _CODE = "*.safetensors", "pytorch_model*.bin", "*.py"


def local_path(path: str, revision: str | None = None, load_format: str = "auto", *, code: bool = False) -> Path:
    """`path` itself if it is there or cannot be meant for the hub, else where its files lie after they were fetched.

    Args:
        path: a folder, a file, a hub id "organisation/name", or a GGUF file on the hub "organisation/name/file.gguf".
        revision: branch, tag or commit on the hub.
        load_format: only the files of this format are fetched; "auto" prefers safetensors.
        code: Python files are fetched, too.

    Raises:
        ConfigError: the hub has no such model or revision, or cannot be reached; says what to do.
    """
    if Path(path).exists():
        return Path(path)
    if match := _REPO_FILE.fullmatch(path):
        return _fetch_file(match[1], match[2], revision)
    if not _REPO_ID.fullmatch(path):
        return Path(path)
    return _fetch_folder(path, revision, load_format, (*_TEXT_FILES, _CODE) if code else _TEXT_FILES)


def _fetch_folder(repo_id: str, revision: str | None, load_format: str, texts: tuple[str, ...]) -> Path:
    weights = {"safetensors": _SAFETENSORS, "pt": _TORCH, "gguf": "*.gguf", "auto": _SAFETENSORS}.get(load_format)
    folder = _snapshot(repo_id, revision, (*texts, *([weights] if weights else [])))
    if load_format == "auto" and not any(folder.glob(_SAFETENSORS)):
        folder = _snapshot(repo_id, revision, (*texts, _TORCH))
    return folder


def _snapshot(repo_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _failure(repo_id, revision, error) from error


def _fetch_file(repo_id: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        parts = [hf_hub_download(repo_id, str(part), revision=revision) for part in split_paths(Path(file))]
        return Path(parts[0])
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _failure(f"{repo_id}/{file}", revision, error) from error


def _failure(name: str, revision: str | None, error: Exception) -> ConfigError:
    at = f" at revision {revision}" if revision else ""
    return ConfigError(
        f"cannot fetch {name}{at} from the Hugging Face hub: {error}. Check the name, the network and HF_TOKEN (for "
        "models that need a permission); or download it elsewhere and pass its folder as --model-path"
    )
