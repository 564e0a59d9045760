"""Size is a budget: files, functions, protocols and the first family's model."""

import ast

import pytest
from source_tree import PACKAGE, all_files, functions, package_files, tree_of, where

pytestmark = pytest.mark.pure

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PROTOCOL_METHODS = 6
MAX_MODEL_LINES = 120


def num_lines(path) -> int:
    return len(path.read_text("utf-8").splitlines())


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.") for decorator in function.decorator_list)


def is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("Protocol") for base in node.bases)


def test_files_are_short() -> None:
    too_long = {where(path): num_lines(path) for path in all_files() if num_lines(path) > MAX_FILE_LINES}
    assert not too_long, f"more than {MAX_FILE_LINES} lines; split by responsibility"


def test_functions_are_short() -> None:
    lengths = {
        f"{where(path, function)} {function.name}": function.end_lineno - function.lineno + 1
        for path in all_files()
        for function in functions(path)
        if not is_kernel(function)
    }
    too_long = {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
    assert not too_long, f"more than {MAX_FUNCTION_LINES} lines; name the parts"


def test_protocols_ask_for_little() -> None:
    asked = {
        f"{where(path, node)} {node.name}": sum(isinstance(item, ast.FunctionDef) for item in node.body)
        for path in package_files()
        for node in ast.walk(tree_of(path))
        if is_protocol(node)
    }
    assert asked, "no protocol found: this test looks in the wrong place"
    too_many = {name: count for name, count in asked.items() if count > MAX_PROTOCOL_METHODS}
    assert not too_many, f"more than {MAX_PROTOCOL_METHODS} required methods"


def test_the_dense_family_stays_small() -> None:
    assert num_lines(PACKAGE / "models/llama/model.py") <= MAX_MODEL_LINES
