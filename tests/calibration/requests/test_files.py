"""Requests from the user's own files, with whatever may be wrong in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import calibration.requests.files
from calibration.requests.files import read_images, read_prompts, read_questions
from calibration.requests.requests import MOST, NamedRequest, Requests, accepted
from calibration.requests.tasks.chat import QUESTIONS
from runtime.errors import EnginecastError, InvalidInput, NotFound
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from runtime.vision.images import encode_image


def draw(path: Path, shade: int = 0, text: str | None = None) -> None:
    """A picture file, and its caption."""
    path.write_bytes(encode_image(np.full((6, 9, 3), shade, np.uint8), "jpeg" if path.suffix == ".jpg" else "png"))
    if text is not None:
        path.with_suffix(".txt").write_text(text)


def prompts(entries: list[NamedRequest]) -> list[str]:
    return [one.request.prompt for one in entries if isinstance(one.request, ImageRequest)]


def questions(entries: list[NamedRequest]) -> list[str]:
    return [str(one.request.messages[0].content[1]) for one in entries if isinstance(one.request, ChatRequest)]


def fussy(entry: NamedRequest) -> str:
    (prompt,) = prompts([entry])
    if "long" in prompt:
        raise InvalidInput("prompt", "is too long")
    return prompt


def deaf(_entry: NamedRequest) -> str:
    raise InvalidInput("prompt", "is too long")


def test_the_user_s_own_that_a_model_cannot_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na long story\n")
    requests = read_prompts(tmp_path / "prompts.txt", "image")
    assert [prompt for _, prompt in accepted(fussy, requests, 2)] == ["a cat"]
    assert requests.skipped == ["line 2: prompt: is too long"]
    with pytest.raises(
        InvalidInput, match=r"prompts: none of prompts.txt can be used: line .: prompt: is too long; line "
    ):
        list(accepted(deaf, read_prompts(tmp_path / "prompts.txt", "image"), 2))


# Prompts


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# mine\n\n  a cat \r\n\t\na döner\n  # a dog\nwhat #1 is\n".encode())
    requests = read_prompts(file, "image")
    assert (requests.origin, requests.file, requests.size) == ("prompts", "prompts.txt", 3)
    assert requests.wanted(None) == 3 and requests.wanted(2) == 2 and requests.wanted(9) == 3
    entries = list(requests.entries)
    assert sorted(prompts(entries)) == ["a cat", "a döner", "what #1 is"]
    assert {one.name: prompts([one])[0] for one in entries} == {
        "line 3": "a cat",
        "line 5": "a döner",
        "line 7": "what #1 is",
    }
    assert [one.request.seed for one in entries] == [0, 1, 2]


def test_a_few_prompts_stand_for_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"number {i}" for i in range(1000)))
    one, again, other = (prompts(list(islice(read_prompts(file, "image", seed).entries, 20))) for seed in (0, 0, 1))
    assert one == again != other
    assert 300 < np.mean([int(prompt.split()[1]) for prompt in one]) < 700
    assert read_prompts(file, "image").wanted(None) == MOST


def test_prompts_are_asked_about_general_pictures(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("what is it?\nwho is it?\n")
    one, again = (list(read_prompts(tmp_path / "prompts.txt", "chat").entries) for _ in range(2))
    assert sorted(questions(one)) == ["what is it?", "who is it?"]
    pictures = [
        [entry.request.images[0] for entry in each if isinstance(entry.request, ChatRequest)] for each in (one, again)
    ]
    assert all(map(np.array_equal, *pictures)) and not np.array_equal(*pictures[0])


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# nothing\n"])
def test_a_file_without_prompts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(InvalidInput, match="holds no prompts, expected one a line"):
        read_prompts(tmp_path / "prompts.txt", "image")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match=r"prompts: file .* does not exist"):
        read_prompts(tmp_path / "none.txt", "image")
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidInput, match=r"prompts: is no UTF-8 text: .* at byte 3"):
        read_prompts(tmp_path / "prompts.txt", "image")
    monkeypatch.setattr(calibration.requests.files, "LONGEST", 3)
    with pytest.raises(InvalidInput, match="prompts: has 4 bytes, expected 3 at most"):
        read_prompts(tmp_path / "prompts.txt", "image")


# Folders of pictures


def test_captions_become_prompts_and_pictures_come_along(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 10, "a\n cat ")
    draw(tmp_path / "b.JPG", 20, "a dog")
    (tmp_path / "notes.md").write_text("not a picture")
    requests = read_images(tmp_path, "image")
    assert (requests.origin, requests.file, requests.size) == ("images", tmp_path.name, 2)
    entries = {one.name: one for one in requests.entries}
    assert {name: prompts([one]) for name, one in entries.items()} == {"a.png": ["a cat"], "b.JPG": ["a dog"]}
    assert all(one.picture is not None and one.picture.shape == (6, 9, 3) for one in entries.values())
    assert requests.skipped == []


def test_pictures_that_cannot_be_used_are_named_and_skipped(tmp_path: Path) -> None:
    draw(tmp_path / "good.png", 0, "a cat")
    draw(tmp_path / "silent.png")
    draw(tmp_path / "blank.png", 0, " \n")
    draw(tmp_path / "strange.png")
    (tmp_path / "strange.txt").write_bytes(b"\xff")
    (tmp_path / "text.png").write_text("no picture")
    whole = encode_image(np.zeros((50, 50, 3), np.uint8))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    requests = read_images(tmp_path, "image")
    assert [one.name for one in requests.entries] == ["good.png"]
    reasons = {reason.split(":")[0]: reason for reason in requests.skipped}
    assert reasons.keys() == {"silent.png", "blank.png", "strange.png", "text.png", "cut.png"}
    assert reasons["silent.png"] == "silent.png: silent.txt: cannot be read: No such file or directory"
    assert reasons["blank.png"] == "blank.png: blank.txt: is empty, expected the picture's caption"
    assert "is no UTF-8 text" in reasons["strange.png"]
    assert reasons["text.png"].startswith("text.png: is no PNG, JPEG, WebP, ") and reasons["text.png"].endswith(
        "(10 bytes)"
    )
    assert "damaged" in reasons["cut.png"]


def test_bombs_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "big.png")
    with (tmp_path / "vast.png").open("wb") as file:
        file.truncate(calibration.requests.files.LONGEST + 1)
    monkeypatch.setattr("runtime.vision.images.decode_image.__defaults__", ("image", 50))
    requests = read_images(tmp_path, "chat")
    assert list(requests.entries) == []
    assert sorted(reason.split(",")[0] for reason in requests.skipped) == [
        "big.png: holds more than 5e-05 megapixels",
        "vast.png: has 268435457 bytes",
    ]


def test_questions_are_asked_about_pictures_in_turn(tmp_path: Path) -> None:
    for i in range(len(QUESTIONS) + 1):
        draw(tmp_path / f"{i}.png", i)
    entries = list(read_images(tmp_path, "chat").entries)
    assert questions(entries) == [*QUESTIONS, QUESTIONS[0]]
    numbers = [int(Path(one.name).stem) for one in entries]
    assert sorted(numbers) == list(range(len(QUESTIONS) + 1))
    assert [one.request.images[0][0, 0, 0] for one in entries] == numbers


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"images: folder .* does not exist"):
        read_images(tmp_path / "none", "image")
    with pytest.raises(InvalidInput, match="holds no pictures"):
        read_images(tmp_path, "image")
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InvalidInput, match=r"images: none of .* can be used: a.png: is no PNG"):
        list(accepted(fussy, read_images(tmp_path, "image"), 1))


# JSON Lines of questions


def lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join(f"{entry if isinstance(entry, str) else json.dumps(entry)}\n" for entry in entries))
    return path


def test_questions_come_from_json_lines(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    draw(tmp_path / "pictures" / "a.png", 10)
    file = lines(
        tmp_path / "q.jsonl",
        {"image": "pictures/a.png", "question": "what is it?", "answer": "a wall"},
        "",
        {"image": "pictures/none.png", "question": "where is it?"},
        {"image": "pictures/a.png", "question": "whose is it?"},
    )
    requests = read_questions(file, "chat")
    assert (requests.origin, requests.file, requests.size) == ("questions", "q.jsonl", 3)
    assert sorted(questions(list(requests.entries))) == ["what is it?", "whose is it?"]
    assert requests.skipped == ["pictures/none.png: cannot be read: No such file or directory"]


GOOD = {"image": "a.png", "question": "what?"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no questions"),
        ([GOOD, "{"], "line 2 is no JSON"),
        (["[" * 100_000], "line 1 is no JSON"),
        ([["a.png", "what?"]], "line 1 has no image or no question"),
        ([GOOD, "", {"image": "a.png"}], "line 3 has no image or no question"),
        ([{"image": "", "question": "what?"}], "line 1 has no image or no question"),
        ([{"image": "a.png", "question": " "}], "line 1 has no image or no question"),
        ([{"image": 3, "question": "what?"}], "line 1 has no image or no question"),
        ([{"image": "/a.png", "question": "what?"}], "line 1 has an absolute path"),
    ],
)
def test_lines_that_are_wrong_are_refused(tmp_path: Path, entries: list[Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=f"questions: .*{message}"):
        read_questions(lines(tmp_path / "q.jsonl", *entries), "chat")


def test_questions_are_not_for_models_that_draw(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match="questions: are for models that chat, and this one draws: give it --prompts, or --images"
    ):
        read_questions(lines(tmp_path / "q.jsonl", GOOD), "image")


READERS: list[tuple[Callable[[Path, str], Requests], str]] = [
    (read_prompts, "image"),
    (read_prompts, "chat"),
    (read_questions, "chat"),
]


@pytest.mark.parametrize(("read", "kind"), READERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | st.builds(lambda value: json.dumps({"image": value}).encode(), st.text())
)
def test_any_file_gives_requests_or_a_reason(
    tmp_path: Path, read: Callable[[Path, str], Requests], kind: str, content: bytes
) -> None:
    (tmp_path / "file").write_bytes(content)
    try:
        requests = read(tmp_path / "file", kind)
    except EnginecastError as error:
        assert str(error)
    else:
        assert len(list(requests.entries)) + len(requests.skipped) == requests.size
