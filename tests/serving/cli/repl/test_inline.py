"""Picture files that are named in a question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runtime.errors import InvalidInput, NotFound
from serving.cli.repl.inline import begins_with_one, content

NAMES = ("a.png", "b c.jpg", "d.JPEG", "it's.webp", "e.png.txt", "pics/f.png")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pics").mkdir()
    for name in NAMES:
        if not name.endswith(".txt"):
            Image.new("RGB", (4, 4)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def split(question: str) -> list[str | bytes]:
    """The parts of a question: texts, and the names of pictures as bytes."""
    parts, paths = content(question)
    names = iter(paths)
    found: list[Any] = [part if isinstance(part, str) else next(names).name.encode() for part in parts]
    assert next(names, None) is None
    return found


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("what is it?", ["what is it?"]),
        ("./a.png what is it?", [b"a.png", "what is it?"]),
        ("what is it? ./a.png", ["what is it?", b"a.png"]),
        ("what is on ./a.png and {}/b c.jpg?", ["what is on ", b"a.png", " and ", b"b c.jpg", "?"]),
        ("./a.png", [b"a.png"]),
        ("a.png ./d.JPEG  a.png what?", [b"a.png", b"d.JPEG", b"a.png", " what?"]),
        ("is it (pics/f.png)?", ["is it (", b"f.png", ")?"]),
        ("tell me of a.png.", ["tell me of ", b"a.png", "."]),
        ("look at '{}/b c.jpg', please", ["look at ", b"b c.jpg", ", please"]),
        ('look at "b c.jpg"', ["look at", b"b c.jpg"]),
        (r"look at {}/b\ c.jpg now", ["look at ", b"b c.jpg", " now"]),
        (r"look at b\ c.jpg now", ["look at ", b"b c.jpg", " now"]),
        (r"look at ./it\'s.webp now", ["look at ", b"it's.webp", " now"]),
        ("look at ~/a.png now", ["look at ", b"a.png", " now"]),
        ("file://{}/b%20c.jpg what?", [b"b c.jpg", "what?"]),
        ("what is the difference of .png and .jpg?", ["what is the difference of .png and .jpg?"]),
        ("https://example.org/a.png what?", ["https://example.org/a.png what?"]),
        ("see 'https://example.org/x.png'", ["see 'https://example.org/x.png'"]),
        ("read e.png.txt", ["read e.png.txt"]),
        ("with /tmp and more, a.png", ["with /tmp and more,", b"a.png"]),
        ("one\ntwo ./a.png\nthree", ["one\ntwo ", b"a.png", "\nthree"]),
    ],
)
def test_pictures_at_their_places(question: str, expected: list[str | bytes], folder: Path) -> None:
    assert split(question.replace("{}", str(folder))) == expected


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("what is on ./nowhere.png?", "./nowhere.png"),
        ("what is on nowhere.png?", "nowhere.png"),
        ("what is on '/no such/dir/b c.jpg'?", "/no such/dir/b c.jpg"),
        ("a.png and ./b.png", "./b.png"),
        ("file:///nowhere/x.png", "file:///nowhere/x.png"),
        ("file://elsewhere.example.org{}/a.png", "file://elsewhere.example.org"),
        ("~nobody-has-this-name/a.png", "~nobody-has-this-name/a.png"),
        (f"./{'x' * 400}.png", "./xxx"),
    ],
)
def test_a_missing_file_is_named(question: str, named: str, folder: Path) -> None:
    with pytest.raises(NotFound, match="there is no such file") as caught:
        content(question.replace("{}", str(folder)))
    assert f"'{named}" in str(caught.value)


def test_a_file_that_is_no_picture_is_refused(folder: Path) -> None:
    (folder / "text.png").write_text("a red fox")
    with pytest.raises(InvalidInput, match=r"text\.png: is no PNG"):
        content("what is on text.png?")
    (folder / "sub.png").mkdir()
    with pytest.raises(NotFound, match=r"sub\.png cannot be read: it is a folder"):
        content("what is on ./sub.png?")


def test_long_texts_take_no_long() -> None:
    text = "https://example.org/a.png " * 1000
    assert content(text) == ([text], [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [("/image x", False), ("/show", False), ("/load a.png", False), ("/tmp/a.png what?", True), ("/a.png", True)],
)
def test_a_path_is_no_command(line: str, expected: bool) -> None:
    assert begins_with_one(line) == expected
