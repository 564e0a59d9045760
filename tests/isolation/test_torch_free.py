"""The server process has no torch: not by importing its folders, and not while it serves."""

import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_server import free_port, live_server
from source_tree import PACKAGE

from hornbeam.models.index import FAMILIES

HEAVY = ("torch", "transformers")
TORCH_FREE = ["core", "config", "scheduler", "text", "engine", "serve"]
SINGLE = ["hornbeam", "hornbeam.cache.pages", "hornbeam.cache.prefix", "hornbeam.models.index"]
IMPORT_ALL = """
import importlib, json, sys
sys.path.insert(0, {tests!r})
from isolation.poison import Poison
sys.meta_path.insert(0, Poison({heavy!r}))
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
assert not set({heavy!r}) & sys.modules.keys()
"""


@pytest.mark.pure
def test_importing_the_torch_free_folders() -> None:
    """In one process where torch and transformers cannot be imported: a failure's traceback shows who wanted them."""
    names = [*SINGLE, *(entry.partition(":")[0] for entry in FAMILIES.entries.values())]
    for folder in TORCH_FREE:
        names += [module.name for module in pkgutil.walk_packages([str(PACKAGE / folder)], f"hornbeam.{folder}.")]
    assert len(names) > 20
    code = IMPORT_ALL.format(tests=str(PACKAGE.parent / "tests"), heavy=HEAVY)
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def maps_torch(pid: int) -> bool:
    """Whether the process has a library of torch in its memory."""
    return bool(re.search(r"/(libtorch|libc10)[^/]*\.so", Path(f"/proc/{pid}/maps").read_text()))


@pytest.mark.cpu
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks into /proc")
def test_a_live_server_has_no_torch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    port = free_port()
    # -X importtime: the server tells every import of its own process on stderr; the engine process does not inherit it.
    command = [sys.executable, "-X", "importtime", "-m", "hornbeam.launch_server", "--model-path", str(tiny_checkpoint)]
    with live_server([*command, "--port", str(port), "--max-total-tokens", "1024"], port, log) as (pid, url):
        message = {"role": "user", "content": "The capital of France"}
        for path, body in (
            ("/generate", {"text": "The capital", "sampling_params": {"max_new_tokens": 4}, "return_logprob": True}),
            ("/v1/chat/completions", {"model": "tiny", "messages": [message], "max_tokens": 4}),
        ):
            response = httpx.post(url + path, json=body, timeout=30)
            assert response.status_code == 200, response.text
        assert not maps_torch(pid)
        assert any(maps_torch(child) for child in children(pid)), "no engine process with torch: nothing was proven"
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", log.read_text(), re.MULTILINE))
    assert "hornbeam.serve" in imported
    assert not imported & set(HEAVY)
