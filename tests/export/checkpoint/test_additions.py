"""How an addition is written: its name, its path, its scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.checkpoint.additions import KINDS, Addition, Kind
from runtime.errors import InvalidInput


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two kinds, one of which is scaled; paths are relative to an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(KINDS, "scaled", Kind("Of a scale.", scaled=True))  # type: ignore[arg-type]
    monkeypatch.setitem(KINDS, "plain", Kind("Of none."))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "path", "name", "scale"),
    [
        ("style", "style", "style", 1.0),
        ("/x/style:0.8", "/x/style", "style", 0.8),
        ("a=/x/style:-1", "/x/style", "a", -1.0),
        ("/x/y=z/style:.5", "/x/y=z/style", "style", 0.5),
        (r"a=C:\\styles\\one", r"C:\\styles\\one", "a", 1.0),
        (r"a=C:\\styles\\one:2", r"C:\\styles\\one", "a", 2.0),
        ("a=/x/v:beta", "/x/v:beta", "a", 1.0),
        ("a=/x/1:2:0.5", "/x/1:2", "a", 0.5),
    ],
)
def test_text(text: str, path: str, name: str, scale: float) -> None:
    assert Addition.parse("scaled", text) == Addition("scaled", Path(path), name, scale)


def test_a_path_that_exists_is_no_scale() -> None:
    Path("v:2").mkdir()
    Path("file.v1.safetensors").touch()
    assert Addition.parse("scaled", "a=v:2") == Addition("scaled", Path("v:2"), "a")
    assert Addition.parse("scaled", "a=v:2:3") == Addition("scaled", Path("v:2"), "a", 3.0)
    assert Addition.parse("plain", "file.v1.safetensors").name == "file.v1"
    assert Addition.parse("plain", ".").name == Path.cwd().name


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("other", "x", "additions: there is no kind 'other'"),
        ("plain", "", r"plain: is '', expected \[NAME=\]PATH"),
        ("plain", "a=", "plain: is 'a=', expected"),
        ("plain", "my style", "plain: my style cannot be named 'my style': give a name"),
        ("plain", "x:0.5", "plain: 'x' has the scale 0.5: a build does not scale one"),
        ("scaled", "x:1000", "scaled: 'x' has the scale 1000, expected -100 to 100"),
    ],
)
def test_refused(kind: str, text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Addition.parse(kind, text)
