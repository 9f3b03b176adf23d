"""Which test proves that a field of an HTTP dialect works, and docs/clients.md, which lists both.

`python -m tests.fakes.proofs` writes the tables of the page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from serving.dialects.http.dialect import Dialect, dialects
from serving.dialects.http.states import WORKS, Row, rows
from serving.host.models import ModelHost
from serving.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])
ROOT: Final = Path(__file__).parents[2]
TESTS: Final = ROOT / "tests" / "serving" / "dialects"
PAGE: Final = ROOT / "docs" / "clients.md"


def proves(endpoint: str, *fields: str) -> Callable[[F], F]:
    """Marks the test of an endpoint, such as "POST /v1/embeddings", and of some of its fields: "input", "model"."""
    return lambda test: test


def proofs(folder: Path) -> dict[tuple[str, str], list[str]]:
    """The tests in a folder that prove each endpoint, whose field is empty, and each field: "test_chat.py::test_x"."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(folder.glob("test_*.py")):
        for name, endpoint, *fields in _marks(ast.parse(file.read_text())):
            for field in ("", *fields):
                tests = found.setdefault((endpoint, field), [])
                if (test := f"{file.name}::{name}") not in tests:
                    tests.append(test)
    return found


def _marks(module: ast.Module) -> Iterator[list[str]]:
    """The name of each marked test, and what it is marked with: texts, or names of the file's constants."""
    constants: dict[str, str] = {}
    for node in module.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                constants[name] = text
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                for mark in node.decorator_list:
                    if (
                        isinstance(mark, ast.Call)
                        and isinstance(mark.func, ast.Name)
                        and mark.func.id == proves.__name__
                    ):
                        yield [node.name, *(_text(argument, constants) for argument in mark.args)]


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    found: str = constants[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)
    return found


def fields(dialect: Dialect) -> list[Row]:
    """The rows of a dialect."""
    return rows(dialect.router(ModelHost([], _none), Settings()).routes)


def _none(bundle: Any, target: str | None) -> Any:
    raise AssertionError("no model is loaded")


def table(found: Iterable[Row], proved: dict[tuple[str, str], list[str]]) -> str:
    """The tables of a dialect, one for each endpoint."""
    lines: list[str] = []
    for row in found:
        if not row.field:
            lines += ["", f"**{row.endpoint}**", "", "| Field | State | Test, or reason |", "|---|---|---|"]
        tests = [f"`{test}`" for test in proved.get((row.endpoint, row.field), [])]
        name = f"`{row.field}`" if row.field else "(the call)"
        lines.append(f"| {name} | {row.state} | {''.join(tests[:1]) if row.state == WORKS else row.why} |")
    return "\n".join(lines[1:])


def written(page: str) -> str:
    """The page with the tables of now. Those of a dialect are between two comments, which each dialect has."""
    for dialect in dialects():
        begin, end = f"<!-- fields of {dialect.name} -->", f"<!-- end of {dialect.name} -->"
        if begin not in page:
            page += f"\n## {dialect.name}\n\n{begin}\n{end}\n"
        new = f"{begin}\n\n{table(fields(dialect), proofs(TESTS / dialect.name))}\n\n{end}"
        page = re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _, new=new: new, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
