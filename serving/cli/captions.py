"""Captions of many pictures in a file, JSON lines: one line for each picture, also if the program was killed meanwhile.

    {"image": "a/fox.png", "caption": "a red fox in the snow"}
    {"image": "a/torn.png", "error": "it is no picture that can be read: ..."}

With several answers for a picture, "captions" has all of them.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from runtime.errors import InvalidInput, NotFound, quoted
from runtime.files import strict_json, written
from runtime.tasks.chat import ChatRequest
from serving.dialects.python.results import Answer
from serving.dialects.python.session import TOGETHER

if TYPE_CHECKING:
    from serving.dialects.python.session import Session
    from serving.dialects.python.stream import Stream

ENDINGS: Final = frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .avif .heic .heif".split())
"""Endings of picture files in a folder; files that are named themselves may have others."""
Failed = InvalidInput | NotFound
"""What is wrong with one picture; other errors end the work."""


def pictures_in(places: Sequence[Path], recursive: bool) -> dict[str, Path]:
    """The pictures of folders, by their path below the folder, and files, by the path given; sorted. Hidden files do
    not count. Raises NotFound, and InvalidInput where two would have the same name.
    """
    found: dict[str, Path] = {}
    for place in places:
        if not place.exists():
            raise NotFound(f"{place} does not exist: name pictures, or folders of them")
        for name, path in [*_below(place, recursive)] if place.is_dir() else [(str(place), place)]:
            if name in found:
                raise InvalidInput("images", f"{found[name]} and {path} would both be called {quoted(name)}")
            found[name] = path
    return dict(sorted(found.items()))


def _below(folder: Path, recursive: bool) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        inner = path.relative_to(folder)
        if path.suffix.lower() in ENDINGS and path.is_file() and not any(part[0] == "." for part in inner.parts):
            yield inner.as_posix(), path


class CaptionFile:
    """A file of captions that is continued. Made by `opened`."""

    def __init__(self, path: Path, lines: Sequence[Mapping[str, Any]], descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.done = {line["image"]: line for line in lines}

    def add(self, image: str, result: Answer | Failed) -> None:
        """Append the line of a picture; when this returns, it is on the disk. Raises OSError."""
        line: dict[str, Any] = {"image": image}
        if isinstance(result, Answer):
            texts = [" ".join(one.text.split()) for one in result.choices]
            line |= {"caption": texts[0]} | ({"captions": texts} if len(texts) > 1 else {})
        else:
            line["error"] = result.reason if isinstance(result, InvalidInput) else str(result)
        data = _encoded(line)
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)


@contextmanager
def opened(path: Path, retry: bool) -> Iterator[CaptionFile]:
    """The captions in a file, and where further ones go. A last line that is not complete, as of a program that was
    killed, is removed; with `retry` those of errors as well. Raises InvalidInput for another file, or one that another
    program writes, and OSError.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InvalidInput("output", f"{path} is being written by another process: wait, or write elsewhere") from None
    try:
        lines, whole = _read(path)
        kept = [line for line in lines if not (retry and "error" in line)]
        if len(kept) < len(lines):
            with written(path) as file:
                file.writelines(map(_encoded, kept))
        elif whole is not None:
            os.truncate(path, whole)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            yield CaptionFile(path, kept, descriptor)
        finally:
            os.close(descriptor)
    finally:
        lock.release()


def _read(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    """The complete lines of a file, and how many bytes they take if there is more; None if there is not."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], None
    end = content.rfind(b"\n") + 1
    lines = [_line(path, number, line) for number, line in enumerate(content[:end].splitlines(), start=1)]
    return lines, end if end < len(content) else None


def _line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    found: Any = None
    with suppress(ValueError):
        found = strict_json(line)
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("image"), str)
        or not {"caption", "error"} & found.keys()
    ):
        raise InvalidInput("output", f"line {number} of {path} is no caption: choose another file, or remove this one")
    return found


def _encoded(line: Mapping[str, Any]) -> bytes:
    try:
        return f"{json.dumps(line, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # a file's name that is no UTF-8
        return f"{json.dumps(line)}\n".encode()


def captioned(
    session: Session, pictures: Mapping[str, Path], request: Callable[[Path], ChatRequest]
) -> Iterator[tuple[str, Answer | Failed]]:
    """The captions of pictures, or what is wrong with one, in order; a few are under way at once. Raises other errors
    of the requests.
    """
    waiting = deque[tuple[str, "Stream[Answer] | Failed"]]()
    try:
        for name, path in pictures.items():
            waiting.append((name, _begun(session, path, request)))
            if len(waiting) == TOGETHER:
                yield _ended(*waiting.popleft())
        while waiting:
            yield _ended(*waiting.popleft())
    finally:
        for stream in _streams(waiting):
            stream.close()


def _streams(waiting: Iterable[tuple[str, Any]]) -> list[Stream[Answer]]:
    return [one for _, one in waiting if not isinstance(one, Failed)]


def _begun(session: Session, path: Path, request: Callable[[Path], ChatRequest]) -> Stream[Answer] | Failed:
    try:
        made = request(path)
    except (InvalidInput, NotFound) as error:
        return error
    try:
        return session.answer(made)
    except InvalidInput as error:
        return _of_picture(error)


def _ended(name: str, begun: Stream[Answer] | Failed) -> tuple[str, Answer | Failed]:
    if isinstance(begun, Failed):
        return name, begun
    with closing(begun):
        try:
            return name, begun.result()
        except InvalidInput as error:
            return name, _of_picture(error)


def _of_picture(error: InvalidInput) -> InvalidInput:
    """The error, if it is of the conversation, which only the picture differs in. Raises any other."""
    if not error.field.startswith("messages"):
        raise error
    return error
