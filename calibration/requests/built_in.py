"""What pipelines are run on to calibrate them: built-in requests, or the user's own prompts, pictures and questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from calibration.capture.sets import Kind
from runtime.errors import InvalidInput, NotFound
from runtime.files import read_regular
from runtime.language.text import Message
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture, decode_image
from samples.world.questions import draw_scene, scene_questions
from samples.world.scenes import held_out, picture_scenes, render

REQUESTS: Final = 8
MOST: Final = 128
"""Requests of the user's own that are run where no count is asked for."""
TRIES: Final = 4
"""Built-in requests tried for each one wanted."""
STEPS: Final = 12
BRIEF_STEPS: Final = (3, 4, 5)
"""Steps of the requests of a brief capture, in turn: of three, twelve calls, each at a noise level of its own."""
MAX_TOKENS: Final = 24
BRIEF_TOKENS: Final = 2
LONGEST: Final = 256 << 20
"""Bytes above which a file is not read: the largest picture that is accepted takes less, even uncompressed."""
BUILT_IN: Final = "built-in"
PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

T = TypeVar("T")

PROMPTS: Final = (
    "a photograph of an old lighthouse on a cliff at sunset, waves below",
    "portrait of an elderly fisherman in a yellow raincoat, soft light",
    "a bowl of ripe oranges on a wooden table, oil painting",
    "a crowded street market at night in the rain, neon reflections",
    "a watercolour of snowy mountains behind a frozen lake",
    "a small red bicycle leaning against a white brick wall",
    "an isometric drawing of a tidy workshop with many tools",
    "close-up of a green frog on a leaf, macro photography",
)
"""Prompts of general models: people, places, things, and several styles."""
QUESTIONS: Final = (
    "describe the picture.",
    "what is in the middle of the picture?",
    "what color is the background?",
    "how many things are there, and what are they?",
    "what does the text in the picture say?",
    "where was this picture taken?",
    "what is the largest thing in the picture?",
    "what might happen next?",
)
"""Asked in turn about pictures that come without questions."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A request and what the user knows it by. `picture`, uint8 RGB [height, width, 3], goes to the VAE encoder of a
    model that draws.
    """

    name: str
    request: ImageRequest | ChatRequest
    picture: Picture | None = None


@dataclass
class Requests:
    """Where requests come from; to be read once. `origin` is built-in, prompts, images or questions, `size` how many
    there may be (None: without end), `file` the file's or folder's name, `usual` how many are run where no count is
    asked for. `skipped` grows while the requests are read: what could not be used, and why.
    """

    kind: Kind
    origin: str
    asked: Iterator[Asked]
    size: int | None = None
    file: str = ""
    usual: int = MOST
    skipped: list[str] = field(default_factory=list)

    def wanted(self, count: int | None) -> int:
        """How many requests to run where `count` is asked for, None being what is usual."""
        most = self.usual if count is None else count
        return most if self.size is None else min(most, self.size)


def image_requests(seed: int = 0) -> Iterator[ImageRequest]:
    """Pictures to draw, without end: scenes of coloured shapes and general prompts in turn, each with its own seed.
    None is held out.
    """
    rng = np.random.default_rng(seed)
    captions = [scene.caption for scene in picture_scenes() if not held_out(scene.caption)]
    for i in count():
        prompt = PROMPTS[i // 2 % len(PROMPTS)] if i % 2 else captions[rng.integers(len(captions))]
        yield ImageRequest(prompt=prompt, steps=STEPS, seed=seed + i)


def chat_requests(seed: int = 0) -> Iterator[ChatRequest]:
    """Questions about drawn scenes, without end, none of them held out, answered greedily."""
    rng = np.random.default_rng(seed)
    while True:
        scene = draw_scene(rng)
        questions = scene_questions(scene, rng)
        question = questions[rng.integers(len(questions))]
        yield _question(render(scene, rng), question.text, seed)


def _question(picture: Picture, text: str, seed: int) -> ChatRequest:
    return ChatRequest(messages=(Message("user", (picture, text)),), max_tokens=MAX_TOKENS, temperature=0.0, seed=seed)


def built_in(kind: Kind, seed: int = 0) -> Requests:
    """The requests that need no files."""
    every: Iterator[ImageRequest | ChatRequest] = image_requests(seed) if kind == "diffusion" else chat_requests(seed)
    requests = (Asked(f"{BUILT_IN} {number}", request) for number, request in enumerate(every, start=1))
    return Requests(kind, BUILT_IN, requests, usual=REQUESTS)


def briefly(requests: Requests) -> Requests:
    """The same requests in few steps or tokens, and fewer of them unless asked: for models of which each call takes
    many seconds.
    """

    def cut(i: int, asked: Asked) -> Asked:
        if isinstance(asked.request, ImageRequest):
            return replace(asked, request=replace(asked.request, steps=BRIEF_STEPS[i % len(BRIEF_STEPS)]))
        return replace(asked, request=replace(asked.request, max_tokens=BRIEF_TOKENS))

    return replace(requests, asked=(cut(i, asked) for i, asked in enumerate(requests.asked)), usual=len(BRIEF_STEPS))


def read_prompts(path: Path, kind: Kind, seed: int = 0) -> Requests:
    """A text file (UTF-8) of prompts, one a line; blank lines and those that begin with # do not count.

    A model that chats is asked each of them about a drawn scene. The order is drawn from the seed, so that the first
    few stand for the whole file. Raises NotFound, InvalidInput.
    """
    prompts = [(number, text) for number, text in _lines(path, "prompts") if not text.startswith("#")]
    if not prompts:
        raise InvalidInput(
            "prompts", f"{path} holds no prompts, expected one a line (lines that begin with # do not count)"
        )

    def asked() -> Iterator[Asked]:
        rng = np.random.default_rng(seed)
        for i, place in enumerate(rng.permutation(len(prompts))):
            number, text = prompts[place]
            picture = None if kind == "diffusion" else render(draw_scene(rng), rng)
            request = (
                _question(picture, text, seed)
                if picture is not None
                else ImageRequest(prompt=text, steps=STEPS, seed=seed + i)
            )
            yield Asked(f"line {number}", request)

    return Requests(kind, "prompts", asked(), len(prompts), path.name)


def read_images(folder: Path, kind: Kind, seed: int = 0) -> Requests:
    """A folder of pictures. For a model that draws each needs a caption, x.txt (UTF-8) for x.png; others are asked
    `QUESTIONS` in turn.

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
    requests = Requests(kind, "images", iter(()), len(files), folder.name)

    def ask(i: int, file: Path) -> Asked:
        picture = read_picture(file)
        if kind == "chat":
            return Asked(file.name, _question(picture, QUESTIONS[i % len(QUESTIONS)], seed))
        return Asked(
            file.name, ImageRequest(prompt=_caption(file.with_suffix(".txt")), steps=STEPS, seed=seed + i), picture
        )

    order = np.random.default_rng(seed).permutation(len(files))
    requests.asked = _usable(
        ((files[place].name, partial(ask, i, files[place])) for i, place in enumerate(order)), requests
    )
    return requests


def read_questions(path: Path, kind: Kind, seed: int = 0) -> Requests:
    """JSON Lines (UTF-8): {"image": a picture's path relative to the file, "question": ...}, for models that chat;
    other keys do not count.

    The order is drawn from the seed. Pictures are read one at a time; one that cannot be used is skipped. Raises
    NotFound, InvalidInput, the latter with the number of a line that is not as above.
    """
    if kind != "chat":
        raise InvalidInput(
            "questions", "are for models that chat, and this one draws: give it --prompts, or --images with captions"
        )
    lines = [_line(path, number, text) for number, text in _lines(path, "questions")]
    if not lines:
        raise InvalidInput(
            "questions",
            f'{path} holds no questions, expected lines such as {{"image": "cat.png", "question": "what is it?"}}',
        )
    requests = Requests(kind, "questions", iter(()), len(lines), path.name)
    order = np.random.default_rng(seed).permutation(len(lines))

    def ask(image: str, question: str) -> Asked:
        return Asked(image, _question(read_picture(path.parent / image, image), question, seed))

    requests.asked = _usable(((lines[place][0], partial(ask, *lines[place])) for place in order), requests)
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


def _usable(asked: Iterable[tuple[str, Callable[[], Asked]]], requests: Requests) -> Iterator[Asked]:
    """Those that can be made. What cannot is told to the requests."""
    for name, make in asked:
        try:
            yield make()
        except InvalidInput as error:
            _skip(requests, name, error)


def _skip(requests: Requests, name: str, error: InvalidInput) -> None:
    reason = str(error)
    requests.skipped.append(reason if reason.startswith(f"{name}: ") else f"{name}: {reason}")


def accepted(ready: Callable[[Asked], T], requests: Requests, wanted: int) -> Iterator[tuple[Asked, T]]:
    """The first `wanted` requests that a model can read, and what `ready` made of each.

    A prompt may be too long for a small model's tokenizer, or a picture too many for its context. Raises InvalidInput
    when there is none.
    """
    found = 0
    refusal: InvalidInput | None = None
    for asked in requests.asked if requests.size is not None else islice(requests.asked, TRIES * wanted):
        try:
            made = ready(asked)
        except InvalidInput as error:
            refusal = error
            if requests.size is not None:
                _skip(requests, asked.name, error)
            continue
        yield asked, made
        found += 1
        if found == wanted:
            return
    if not found and requests.size is not None:
        raise InvalidInput(requests.origin, f"none of {requests.file} can be used: {'; '.join(requests.skipped[:3])}")
    if not found and refusal is not None:
        raise refusal
