"""How results are shown and kept: lines to stdout, JSON lines to files."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def show(text: str) -> None:
    """For people, at once."""
    print(text, flush=True)  # noqa: T201


def append_json(path: Path | None, results: Iterable[Mapping[str, Any]]) -> None:
    """A JSON line each at the end of the file `path`, if there is one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(result)}\n" for result in results)
