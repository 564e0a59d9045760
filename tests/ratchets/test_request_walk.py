"""A reader can follow one request: few files, few lines. `pytest -s` prints the walk; docs/architecture.md tells it.

The walk is through code that decides something. An op's kernel is its leaf: the layers call it by its contract, and
one model's half dozen of them are counted in lines, not in files.
"""

import os
import sys
from pathlib import Path

import httpx
import pytest
from live_server import free_port, live_server
from source_tree import PACKAGE, ROOT, where

pytestmark = pytest.mark.cpu

MAX_FILES = 28
MAX_LINES = 6000
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "The capital of France"}], "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def calls(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of one streamed chat request: the files that ran code in both processes, and the functions, first call first."""
    folder = tmp_path_factory.mktemp("walk")
    flag, port = folder / "flag", free_port()
    script = Path(__file__).parent / "request_trace.py"
    command = [sys.executable, str(script), str(flag), str(port), str(tiny_checkpoint)]
    path = os.pathsep.join([str(script.parent), str(PACKAGE.parent)])
    with live_server(command, port, folder / "log", env={**os.environ, "PYTHONPATH": path}) as (_, url):
        flag.touch()
        response = httpx.post(f"{url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=30)
        flag.unlink()
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    found: dict[str, list[str]] = {}
    for trace in sorted(folder.glob("flag.*"), key=lambda file: int(file.suffix[1:])):
        for line in dict.fromkeys(trace.read_text().splitlines()):
            file, _, function = line.partition(" ")
            found.setdefault(file, []).append(function)
    return found


def test_a_request_visits_few_files(calls: dict[str, list[str]]) -> None:
    lengths = {where(PACKAGE / file): len((PACKAGE / file).read_text().splitlines()) for file in calls}
    visited = [file for file in calls if not Path(file).match("ops/*/*.py")]
    for file, functions in calls.items():
        print(f"{file}: {', '.join(functions)}")
    print(f"{len(visited)} files and {len(calls) - len(visited)} kernels, {sum(lengths.values())} lines")
    assert {"serve/openai.py", "scheduler/scheduler.py", "models/llama/model.py"} <= set(visited), "too little was seen"
    assert len(visited) <= MAX_FILES, visited
    assert sum(lengths.values()) <= MAX_LINES, lengths


def test_the_walk_is_told(calls: dict[str, list[str]]) -> None:
    told = (ROOT / "docs/architecture.md").read_text("utf-8")
    assert not [file for file in calls if f"`{file}`" not in told and not Path(file).match("ops/*/*.py")]
