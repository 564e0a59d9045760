"""Habits that a linter does not know: no ambient state, no pickle, one reader of the environment, one direction."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from source_tree import PACKAGE, imported_names, package_files, tree_of, where

pytestmark = pytest.mark.pure

FOLDERS = [  # in import order
    "core",
    "config",
    "platforms",
    "comm",
    "ops",
    "quant",
    "cache",
    "layers",
    "weights",
    "models",
    "sampling",
    "scheduler",
    "executor",
    "text",
    "engine",
    "serve",
    "bench",
]
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
PICKLING_CALLS = {"send_pyobj", "recv_pyobj"}


def is_call_to(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return any(alias.name in ("environ", "environb", "getenv", "putenv") for alias in node.names)
    return isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.environb", "os.getenv")


def pickles(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return any(name.split(".")[0] in PICKLES for name in names)
    if isinstance(node, ast.keyword):
        return node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
        return not any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in node.keywords)
    return isinstance(node, ast.Attribute) and node.attr in PICKLING_CALLS


FORBIDDEN: dict[str, Callable[[ast.AST], bool]] = {
    "global state": lambda node: isinstance(node, ast.Global),
    "hasattr": lambda node: is_call_to(node, "hasattr"),
    "a bare except": lambda node: isinstance(node, ast.ExceptHandler) and node.type is None,
    "reading the environment outside config/environment.py": reads_environment,
    "pickle": pickles,
    "a relative import": lambda node: isinstance(node, ast.ImportFrom) and node.level > 0,
}
ALLOWED = {"reading the environment outside config/environment.py": {"hornbeam/config/environment.py"}}


def violations(rule: str, path: Path) -> Iterator[str]:
    if where(path) not in ALLOWED.get(rule, ()):
        yield from (where(path, node) for node in ast.walk(tree_of(path)) if FORBIDDEN[rule](node))


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_the_package_does_without(rule: str) -> None:
    assert not [hit for path in package_files() for hit in violations(rule, path)]


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("global state", "def f():\n    global x"),
        ("hasattr", "hasattr(a, 'b')"),
        ("a bare except", "try:\n    pass\nexcept:\n    pass"),
        ("reading the environment outside config/environment.py", "import os\nos.environ['A']"),
        ("reading the environment outside config/environment.py", "from os import getenv"),
        ("pickle", "import pickle"),
        ("pickle", "from cloudpickle import dumps"),
        ("pickle", "torch.load(path)"),
        ("pickle", "torch.load(path, weights_only=False)"),
        ("pickle", "socket.send_pyobj(x)"),
        ("pickle", "np.load(path, allow_pickle=True)"),
        ("a relative import", "from . import x"),
    ],
)
def test_the_rules_bite(rule: str, source: str) -> None:
    assert any(FORBIDDEN[rule](node) for node in ast.walk(ast.parse(source)))


def test_package_files_are_empty_but_for_the_top_one() -> None:
    files = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    assert files
    assert not [where(path) for path in files if path.read_text().strip()]


def test_every_module_says_what_it_is() -> None:
    modules = [path for path in package_files() if path.name != "__init__.py" or path.parent == PACKAGE]
    assert not [where(path) for path in modules if not ast.get_docstring(tree_of(path))]


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FOLDERS)


def test_types_too_are_known_only_downwards() -> None:
    """import-linter holds what runs to this order; imports for the type checker alone are held to it here."""
    upwards = []
    for path in package_files():
        folder = path.relative_to(PACKAGE).parts[0]
        for node, name in imported_names(path) if folder in FOLDERS else ():
            target = name.split(".")[1] if name.startswith("hornbeam.") else folder
            if target in FOLDERS and FOLDERS.index(target) > FOLDERS.index(folder):
                upwards.append(f"{where(path, node)} {name}")
    assert not upwards
