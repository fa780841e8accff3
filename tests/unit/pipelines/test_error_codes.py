"""Codes are part of the wire contract, so none is raised that the table does not explain."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines

PACKAGE = Path(pipelines.__file__).parent
TABLE = PACKAGE.parent / "docs" / "job-errors.md"
ERRORS = {"InvalidJob", "InvalidModel", "InferenceFailed"}


def raised_codes(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            first = node.args[0] if node.args else None
            if node.func.id in ERRORS and isinstance(first, ast.Constant):
                yield first.value


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_every_code_is_in_the_table(path: Path) -> None:
    table = TABLE.read_text("utf-8")
    assert [c for c in raised_codes(path.read_text("utf-8")) if f"`{c}`" not in table] == []


def test_codes_are_found_at_all() -> None:
    assert "text_has_nul" in set(raised_codes((PACKAGE / "modalities" / "text.py").read_text()))
