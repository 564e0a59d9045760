"""A model family can break, be switched off or be deleted, and nobody else notices."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import PACKAGE, package_files, where

from hornbeam.models.index import ARCHITECTURES, FAMILIES

LLAMA = "llama"  # the family that the other folders' end-to-end tests run
FAMILY_NAMES = FAMILIES.names()
WELL_KNOWN = (
    "baichuan|bert|cohere|deepseek|ernie|exaone|falcon|gemma|glm|gpt2|gpt_?neox|gpt_?oss|granite|internlm|kimi|llama|"
    "mamba|minicpm|minimax|mistral|mixtral|nemotron|olmo|olmoe|phi|qwen|smollm|stablelm|starcoder"
)
# It begins a word or a CamelCase part of one, and no lower-case letter follows: "phi3", "HfPhiConfig", not "graphic".
FAMILY_NAME = re.compile(
    rf"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:{'|'.join(map(re.escape, FAMILY_NAMES))}|{WELL_KNOWN})(?![a-z])"
)


def architectures_of(family: str) -> list[str]:
    return [name for name, owner in ARCHITECTURES.items() if owner == family]


def folder_of(family: str) -> str:
    return FAMILIES.entries[family].rpartition(".")[0]


def run(script: str, *arguments: object, **variables: str) -> str:
    """Run Python code or a script in a process of its own, where nothing is imported yet; what it printed."""
    start = [script] if script.endswith(".py") else ["-c", script]
    command = [sys.executable, *start, *map(json.dumps, arguments)]
    result = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.cpu
def test_broken_families_do_not_touch_the_others(tiny_checkpoint: Path) -> None:
    """All families but one are unimportable, at once: that one serves as before, the others say why they cannot."""
    script = str(Path(__file__).parent / "poison.py")
    others = [family for family in FAMILY_NAMES if family != LLAMA]
    asked = {architecture: family for family in others for architecture in architectures_of(family)}
    intact = json.loads(run(script, str(tiny_checkpoint), [], []))
    poisoned = json.loads(run(script, str(tiny_checkpoint), [folder_of(family) for family in others], list(asked)))
    assert len(intact["output_ids"]) == 8
    assert poisoned["output_ids"] == intact["output_ids"]
    assert {architecture: family for architecture, (family, _) in poisoned["refusals"].items()} == asked
    assert all("is poisoned" in cause for _, cause in poisoned["refusals"].values())


BUILD = """
import json, sys
sys.path.insert(0, {tests!r})
from isolation.poison import Poison
from hornbeam.core.errors import FamilyUnavailable
from hornbeam.engine.build import build_engine

folder, poisoned = map(json.loads, sys.argv[1:])
sys.meta_path.insert(0, Poison(poisoned))
try:
    build_engine({{"model_path": folder, "load_format": "dummy"}})
except FamilyUnavailable as error:
    print(json.dumps([error.family, str(error), sorted(sys.modules)]))
"""


def build_failure(family: str, architecture: str, folder: Path, poisoned: list[str], disabled: str) -> tuple[str, set]:
    """What is said when a model of `architecture` is built, and the modules that were imported until then."""
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    code = BUILD.format(tests=str(PACKAGE.parent / "tests"))
    name, message, modules = json.loads(run(code, str(folder), poisoned, HORNBEAM_DISABLED_MODEL_ARCHS=disabled))
    assert name == family
    return message, set(modules)


@pytest.mark.pure
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_broken_family_says_why(family: str, tmp_path: Path) -> None:
    architecture = architectures_of(family)[0]
    message, _ = build_failure(family, architecture, tmp_path, [folder_of(family)], disabled="")
    assert message == f"model family {family!r} is unavailable: {folder_of(family)} is poisoned"


@pytest.mark.pure
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_disabled_architecture_is_never_imported(family: str, tmp_path: Path) -> None:
    names = architectures_of(family)
    for disabled in (",".join(names), f" {family} ,Unheard"):
        message, modules = build_failure(family, names[0], tmp_path, [], disabled)
        assert "HORNBEAM_DISABLED_MODEL_ARCHS" in message
        assert not [module for module in modules if module.startswith(folder_of(family))]
        assert "torch" not in modules


@pytest.mark.pure
def test_no_family_is_named_outside_models() -> None:
    """Names of a wire format may stand in text/formats/."""
    exempt = (PACKAGE / "models", PACKAGE / "text" / "formats")
    hits = [
        f"{where(path)}:{number} {line.strip()}"
        for path in package_files()
        if not any(path.is_relative_to(folder) for folder in exempt)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if FAMILY_NAME.search(line)
    ]
    assert not hits


@pytest.mark.pure
@pytest.mark.parametrize(
    "text", ["llama", "a llama3 rope", "LlamaForCausalLM", "HfPhiConfig", "DeepSeek-V2", "is_qwen2_moe"]
)
def test_a_family_name_is_seen(text: str) -> None:
    assert FAMILY_NAME.search(text)


@pytest.mark.pure
@pytest.mark.parametrize("text", ["graphic", "philosophy", "coherent", "albert", "a graph is captured"])
def test_other_words_are_no_family_names(text: str) -> None:
    assert not FAMILY_NAME.search(text)
