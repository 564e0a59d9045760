"""The project's own source as syntax trees, for the tests that hold it to its rules."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hornbeam"


def is_family_test(path: Path) -> bool:
    return path.match("hornbeam/models/*/tests/*")


def package_files() -> list[Path]:
    """Modules of `hornbeam/`, the tests in families' folders left out."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not is_family_test(path)]


def all_files() -> list[Path]:
    """Every Python file of the project."""
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")])


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def where(path: Path, node: ast.AST | None = None) -> str:
    """`path:line`, as an editor can follow it."""
    line = "" if node is None else f":{getattr(node, 'lineno', 1)}"
    return f"{path.relative_to(ROOT)}{line}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported_names(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every absolute import, wherever it stands: (statement, "a.b" or "a.b.name")."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)
