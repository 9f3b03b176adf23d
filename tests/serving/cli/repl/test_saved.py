"""Conversations in files."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runtime.errors import InvalidInput, NotFound
from serving.cli.repl import saved
from serving.cli.repl.saved import Turn, load, save


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    return file.getvalue()


TURNS = [
    Turn("system", "be terse"),
    Turn("user", ["what is on ", picture(), "?"]),
    Turn("assistant", "a réd", stopped=True),
]


def facts(turns: list[Turn]) -> list[tuple[object, ...]]:
    return [(turn.role, list(turn.parts), turn.stopped) for turn in turns]


def test_a_conversation_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    save(path, "talk", TURNS)
    assert facts(load(path)) == facts(TURNS)
    save(path, "talk", TURNS[:1])
    assert len(load(path)) == 1, "one conversation replaces another"
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]
    written = json.loads(path.read_bytes())
    assert (written["format"], written["version"], written["model"]) == ("enginecast conversation", 1, "talk")


def test_no_other_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "diary.txt"
    path.write_text("dear diary")
    with pytest.raises(InvalidInput, match="is no saved conversation"):
        save(path, "talk", TURNS)
    assert path.read_text() == "dear diary"


def test_one_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "BYTES", 200)
    with pytest.raises(InvalidInput, match="expected at most 200"):
        save(tmp_path / "talk.json", "talk", TURNS)
    assert not list(tmp_path.iterdir())


IMAGE = base64.b64encode(picture()).decode()


def file(*content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    message = {"role": role, "content": list(content)}
    return {"format": "enginecast conversation", "version": 1, "messages": [message], **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no saved conversation"),
        ("[1]", "is no saved conversation"),
        ('{"format": "enginecast conversation", "format": "x"}', "stands in it twice"),
        (file({"text": "x"}, version=2), "has version 2, expected 1"),
        (file({"text": "x"}, format="other"), "format: Input should be 'enginecast conversation'"),
        (file({"text": "x"}, seed=1), "seed: Extra inputs are not permitted"),
        (file({"text": "x"}, role="tool"), "messages.0.role: Input should be"),
        (file({"text": "x", "image": IMAGE}), "expected either a text or an image"),
        (file({}), "expected either a text or an image"),
        (file({"image": "###"}), "messages.0.content.0.image"),
        (file({"image": base64.b64encode(b"no picture").decode()}), "is no PNG"),
        (file(*[{"image": IMAGE}] * 33), "has 33 pictures of a request, expected at most 32"),
        (file({"text": "x" * 100_001}), "expected at most 100,000"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_read_is_checked(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidInput) as caught:
        load(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nowhere\.json cannot be read: No such file"):
        load(tmp_path / "nowhere.json")
