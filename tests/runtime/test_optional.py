"""Optional packages: not installed, or installed and of no use, are distinguished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.errors import MissingDependency
from runtime.optional import require


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_package_that_is_there() -> None:
    assert require("json", "any") is json


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(
        MissingDependency,
        match=r"^no_such_sdk\.core is not installed, which this needs: pip install 'enginecast\[sdk\]'$",
    ):
        require("no_such_sdk.core", "sdk")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import its_own_need", r"^its_own_need is not installed, which this needs: pip install 'enginecast\[sdk\]'$"),
        (
            "raise ImportError('libcudart.so.13: cannot open\\nshared object')",
            r"^broken_sdk is installed and cannot be imported \(libcudart\.so\.13: ",
        ),
        (
            "raise OSError('wrong ELF class')",
            r"^broken_sdk is installed and cannot be imported \(wrong ELF class\): install what is missing",
        ),
    ],
)
def test_a_package_that_is_installed_and_of_no_use(packages: Path, content: str, message: str) -> None:
    (packages / "broken_sdk.py").write_text(content)
    with pytest.raises(MissingDependency, match=message):
        require("broken_sdk", "sdk")
