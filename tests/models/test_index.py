import subprocess
import sys
from pathlib import Path

import pytest

from hornbeam.core.errors import ConfigError, FamilyUnavailable
from hornbeam.models.index import ARCHITECTURES, FAMILIES, find_family
from hornbeam.models.llama.rows import ROWS

pytestmark = pytest.mark.pure


def run_python(code: str) -> None:
    """In a process of its own, where nothing is imported yet."""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_architecture_has_a_family() -> None:
    assert set(ARCHITECTURES.values()) <= set(FAMILIES.names())
    for architecture, family in ARCHITECTURES.items():
        assert find_family({"architectures": [architecture]}).name == family


def test_each_row_of_the_dense_family_can_be_found() -> None:
    assert {name for name, family in ARCHITECTURES.items() if family == "llama"} == ROWS.keys()


def test_the_first_known_architecture_counts() -> None:
    assert find_family({"architectures": ["Unheard", "LlamaForCausalLM"]}).name == "llama"


@pytest.mark.parametrize("named", [[], None, "LlamaForCausalLM", [["LlamaForCausalLM"]]])
def test_a_config_without_architecture(named: object) -> None:
    with pytest.raises(ConfigError, match="names no architectures"):
        find_family({"architectures": named})


def test_an_unknown_architecture_lists_what_is_supported() -> None:
    with pytest.raises(ConfigError, match=r"Unheard.*LlamaForCausalLM.*docs/adding-a-model\.md"):
        find_family({"architectures": ["Unheard"]})


@pytest.mark.parametrize("disabled", ["LlamaForCausalLM", "llama"])
def test_a_disabled_architecture_is_never_imported(disabled: str) -> None:
    run_python(f"""
import sys
from hornbeam.core.errors import FamilyUnavailable
from hornbeam.models.index import find_family
try:
    find_family({{"architectures": ["LlamaForCausalLM"]}}, frozenset({{{disabled!r}}}))
except FamilyUnavailable as error:
    assert "disabled by HORNBEAM_DISABLED_MODEL_ARCHS" in str(error), error
else:
    raise AssertionError("served")
assert not [name for name in sys.modules if name.startswith("hornbeam.models.llama")]
""")


@pytest.mark.parametrize("poison", ["raise RuntimeError('poisoned')", "import nonexistent_poisoned"])
def test_a_family_whose_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str) -> None:
    (tmp_path / "poisoned_family.py").write_text(poison)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FAMILIES.entries, "poisoned", "poisoned_family:FAMILY")
    monkeypatch.setitem(ARCHITECTURES, "PoisonedForCausalLM", "poisoned")
    with pytest.raises(FamilyUnavailable, match="poisoned") as caught:
        find_family({"architectures": ["PoisonedForCausalLM"]})
    assert caught.value.family == "poisoned"
    assert isinstance(caught.value.cause, Exception)
    assert find_family({"architectures": ["LlamaForCausalLM"]}).name == "llama"


def test_only_the_wanted_family_is_imported_and_without_torch() -> None:
    run_python("""
import sys
from hornbeam.models.index import FAMILIES, find_family
assert not [name for name in sys.modules if name.startswith("hornbeam.models.") and name != "hornbeam.models.index"]
FAMILIES.entries["other"] = "nonexistent_other:FAMILY"
find_family({"architectures": ["LlamaForCausalLM"]})
assert not {"torch", "transformers"} & sys.modules.keys()
""")


def test_another_package_adds_a_family_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside.py").write_text("class Family:\n    name = 'outside'\nFAMILY = Family()\n")
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hornbeam.models]\nOutsideForCausalLM = outside:FAMILY\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_family({"architectures": ["OutsideForCausalLM"]}).name == "outside"
    with pytest.raises(ConfigError, match="OutsideForCausalLM"):
        find_family({"architectures": ["Unheard"]})
