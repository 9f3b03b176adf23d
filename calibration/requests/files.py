"""Requests from the user's own prompts, pictures and questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from calibration.requests.requests import NamedRequest, Requests, skip
from calibration.requests.task import task_requests
from runtime.errors import InvalidInput, NotFound
from runtime.files import read_regular
from runtime.vision.images import Picture, decode_image

LONGEST: Final = 256 << 20
"""Bytes above which a file is not read: the largest picture that is accepted takes less, even uncompressed."""
PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_prompts(path: Path, task: str, seed: int = 0) -> Requests:
    """A text file (UTF-8) of prompts, one a line; blank lines and those that begin with # do not count.

    A model that chats is given each of them with one of the general pictures. The order is drawn from the seed, so that
    the first few stand for the whole file. Raises NotFound, InvalidInput.
    """
    prompts = [(number, text) for number, text in _lines(path, "prompts") if not text.startswith("#")]
    if not prompts:
        raise InvalidInput(
            "prompts", f"{path} holds no prompts, expected one a line (lines that begin with # do not count)"
        )

    def entries() -> Iterator[NamedRequest]:
        maker = task_requests()[task]
        for i, place in enumerate(np.random.default_rng(seed).permutation(len(prompts))):
            number, text = prompts[place]
            yield NamedRequest(f"line {number}", maker.calibrating(maker.of_prompt(text, i), i, seed))

    return Requests(task, "prompts", entries(), len(prompts), path.name)


def read_images(folder: Path, task: str, seed: int = 0) -> Requests:
    """A folder of pictures. For a model that draws each needs a caption, x.txt (UTF-8) for x.png; a chat model gets
    general questions in turn.

    The order is drawn from the seed. Pictures are read one at a time; one that cannot be used is skipped. Raises
    NotFound, InvalidInput.
    """
    if not folder.is_dir():
        raise NotFound(
            f"images: folder {folder} does not exist, expected one that holds pictures ({', '.join(PICTURES)})"
        )
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise InvalidInput("images", f"{folder} holds no pictures, expected {', '.join(PICTURES)}")
    requests = Requests(task, "images", iter(()), len(files), folder.name)

    maker = task_requests()[task]

    def ask(i: int, file: Path) -> NamedRequest:
        request, picture = maker.of_picture(read_picture(file), partial(_caption, file.with_suffix(".txt")), i)
        return NamedRequest(file.name, maker.calibrating(request, i, seed), picture)

    order = np.random.default_rng(seed).permutation(len(files))
    requests.entries = _usable(
        ((files[place].name, partial(ask, i, files[place])) for i, place in enumerate(order)), requests
    )
    return requests


def read_questions(path: Path, task: str, seed: int = 0) -> Requests:
    """JSON Lines (UTF-8): {"image": a picture's path relative to the file, "question": ...}, for models that chat;
    other keys do not count.

    The order is drawn from the seed. Pictures are read one at a time; one that cannot be used is skipped. Raises
    NotFound, InvalidInput, the latter with the number of a line that is not as above.
    """
    maker = task_requests()[task]
    maker.check_questions()
    lines = [_line(path, number, text) for number, text in _lines(path, "questions")]
    if not lines:
        raise InvalidInput(
            "questions",
            f'{path} holds no questions, expected lines such as {{"image": "cat.png", "question": "what is it?"}}',
        )
    requests = Requests(task, "questions", iter(()), len(lines), path.name)
    order = np.random.default_rng(seed).permutation(len(lines))

    def ask(image: str, question: str) -> NamedRequest:
        request = maker.of_question(read_picture(path.parent / image, image), question)
        return NamedRequest(image, maker.calibrating(request, 0, seed))

    requests.entries = _usable(((lines[place][0], partial(ask, *lines[place])) for place in order), requests)
    return requests


def _line(path: Path, number: int, text: str) -> tuple[str, str]:
    """The picture and the question of a line."""
    expected = 'expected {"image": "a path relative to this file", "question": "some text"}'
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("questions", f"{path}, line {number} is no JSON ({error}), {expected}") from None
    image, question = (data.get("image"), data.get("question")) if isinstance(data, dict) else (None, None)
    if not isinstance(image, str) or not isinstance(question, str) or not image or not question.strip():
        raise InvalidInput("questions", f"{path}, line {number} has no image or no question, {expected}")
    if Path(image).is_absolute():
        raise InvalidInput("questions", f"{path}, line {number} has an absolute path, {expected}")
    return image, question


def _lines(path: Path, field: str) -> list[tuple[int, str]]:
    """The lines that are not blank, stripped, and their numbers from 1."""
    if not path.is_file():
        raise NotFound(f"{field}: file {path} does not exist")
    text = _text(path, field)
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _text(path: Path, field: str) -> str:
    try:
        return _bytes(path, field).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(field, f"is no UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8") from None


def _bytes(path: Path, field: str) -> bytes:
    try:
        if path.stat().st_size > LONGEST:
            raise InvalidInput(field, f"has {path.stat().st_size} bytes, expected {LONGEST} at most")
        return read_regular(path, LONGEST)
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise InvalidInput(field, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_picture(path: Path, name: str = "") -> Picture:
    """A picture's pixels, uint8 RGB [height, width, 3]. Raises InvalidInput naming the file, by `name` if given."""
    name = name or path.name
    return decode_image(_bytes(path, name), name)


def _caption(path: Path) -> str:
    caption = " ".join(_text(path, path.name).split())
    if not caption:
        raise InvalidInput(path.name, "is empty, expected the picture's caption")
    return caption


def _usable(entries: Iterable[tuple[str, Callable[[], NamedRequest]]], requests: Requests) -> Iterator[NamedRequest]:
    """Those that can be made. The others are listed as skipped."""
    for name, make in entries:
        try:
            yield make()
        except InvalidInput as error:
            skip(requests, name, error)
