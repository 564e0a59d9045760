"""Registries choose by preference, explain what they skipped, and let no broken entry harm the others."""

import sys
from pathlib import Path

import pytest

from hornbeam.core.errors import ConfigError
from hornbeam.core.registry import Registry

pytestmark = pytest.mark.pure

MODULES = {
    "good_backend": "class B:\n    def supports(self, query): return None\nB = B()\n",
    "picky_backend": (
        "class B:\n    def supports(self, query): return None if query == 'gpu' else 'needs a gpu'\nB = B()\n"
    ),
    "broken_backend": "raise OSError('libfoo.so is missing')\n",
    "lying_backend": "class B:\n    def supports(self, query): raise RuntimeError('driver')\nB = B()\n",
}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str, object]:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    order = ("broken", "lying", "picky", "good")
    return Registry("thing", {name: f"{name}_backend:B" for name in order})


def test_the_first_that_supports_the_query_is_chosen(registry: Registry[str, object]) -> None:
    choice = registry.choose("cpu")
    assert choice.name == "good"
    assert dict(choice.skipped) == {
        "broken": "OSError: libfoo.so is missing",
        "lying": "RuntimeError: driver",
        "picky": "needs a gpu",
    }
    assert registry.choose("gpu").name == "picky"


def test_nothing_is_imported_before_it_is_asked(registry: Registry[str, object]) -> None:
    registry.choose("cpu", wanted="good")
    assert "broken_backend" not in sys.modules
    assert "picky_backend" not in sys.modules


def test_a_wanted_entry_is_taken_or_refused_with_its_reason(registry: Registry[str, object]) -> None:
    with pytest.raises(ConfigError, match="picky: needs a gpu"):
        registry.choose("cpu", wanted="picky")
    with pytest.raises(ConfigError, match="no thing named 'nonsense'; there are: broken, lying, picky, good"):
        registry.choose("cpu", wanted="nonsense")


def test_one_that_promises_too_much_is_skipped(registry: Registry[str, object]) -> None:
    def probe(entry: object) -> None:
        if type(entry).__module__ == "picky_backend":
            raise FloatingPointError("gives up when used")

    choice = registry.choose("gpu", probe=probe)
    assert choice.name == "good"
    assert dict(choice.skipped)["picky"] == "FloatingPointError: gives up when used"
    with pytest.raises(ConfigError, match="gives up when used"):
        registry.choose("gpu", wanted="picky", probe=probe)


def test_none_can_serve(registry: Registry[str, object]) -> None:
    del registry.entries["good"]
    with pytest.raises(ConfigError, match=r"broken: OSError.*; picky: needs a gpu"):
        registry.choose("cpu")
