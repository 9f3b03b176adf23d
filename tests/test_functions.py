"""Functions are short enough to be read at once. ruff holds their complexity, and this file their length."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
LONGEST: Final = 60
LAYERS: Final = ("enginecast", "export", "runtime", "serving", "calibration", "profiles", "samples")
TO_SPLIT: Final = {
    "train in samples/recipes/train_vlm.py",
}


def long_functions() -> Iterator[str]:
    """Every function of more lines, with its file."""
    for file in (file for layer in LAYERS for file in (ROOT / layer).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= LONGEST:
                    yield f"{node.name} in {file.relative_to(ROOT).as_posix()}"


def test_functions_are_short() -> None:
    assert set(long_functions()) <= TO_SPLIT
