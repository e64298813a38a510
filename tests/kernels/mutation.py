"""Faults by what is written, not by how: an expression of a function is replaced by another.

A row of mutants.tsv names a function as module.function, and two Python expressions or statements.
The first is looked for in the function's syntax tree, so layout, line breaks and comments do not
matter. A name that begins with ``any_`` stands for any expression, the same one in both, so a local
variable that is no part of the fault may be renamed.
"""

import ast
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).parents[2] / "lora_kernels/kernels"
_WILDCARD = "any_"


class Mutant(NamedTuple):
    """A fault: the file, the function in it, what is written there, and what is there instead."""

    file: Path
    function: str
    written: str
    mutated: str

    def places(self) -> list[tuple[ast.AST, dict[str, ast.AST]]]:
        """The nodes that match what is written, and what the wildcards stand for in each."""
        pattern = _parsed(self.written)
        function = _function(ast.parse(self.file.read_text(encoding="utf-8")), self.function)
        found = []
        for node in ast.walk(function):
            bound: dict[str, ast.AST] = {}
            if _matches(pattern, node, bound):
                found.append((node, bound))
        return found

    def source(self) -> str:
        """The file's text with the fault in it."""
        ((node, bound),) = self.places()
        lines = self.file.read_bytes().splitlines(keepends=True)
        start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
        end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
        mutated = ast.unparse(_Bound(bound).visit(_parsed(self.mutated)))
        if isinstance(node, ast.expr):
            mutated = f"({mutated})"
        text = b"".join(lines)
        return (text[:start] + mutated.encode() + text[end:]).decode()


def read(table: Path = Path(__file__).parent / "mutants.tsv") -> dict[str, Mutant]:
    """The rows of a table by the fault's name."""
    mutants = {}
    for line in table.read_text(encoding="utf-8").splitlines()[1:]:
        fault, place, written, mutated = line.split("\t")
        module, function = place.split(".")
        mutants[fault] = Mutant(KERNELS / f"{module}.py", function, written, mutated)
    return mutants


def _function(tree: ast.AST, name: str) -> ast.AST:
    (function,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return function


def _parsed(text: str) -> ast.AST:
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _matches(pattern, node, bound: dict[str, ast.AST]) -> bool:
    if isinstance(pattern, ast.Name) and pattern.id.startswith(_WILDCARD):
        if not isinstance(node, ast.expr):
            return False
        known = bound.setdefault(pattern.id, node)
        return ast.dump(known) == ast.dump(node)
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(_matches(*pair, bound) for pair in zip(pattern, node, strict=True))
        )
    if not isinstance(pattern, ast.AST):
        return pattern == node
    return type(pattern) is type(node) and all(
        _matches(getattr(pattern, field), getattr(node, field), bound) for field in pattern._fields
    )


class _Bound(ast.NodeTransformer):
    """Puts in the places of wildcards what they stand for."""

    def __init__(self, bound: dict[str, ast.AST]):
        self._bound = bound

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._bound.get(node.id, node)
