"""Conversations as files of JSON: messages with their texts and pictures in order, pictures as base64.

{"format": "enginecast conversation", "version": 1, "model": "shapes-vlm", "messages": [
    {"role": "user", "content": [{"image": "iVBORw0..."}, {"text": "What is this?"}]},
    {"role": "assistant", "content": [{"text": "a red"}], "stopped": true}]}
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from runtime.errors import InvalidInput, NotFound
from runtime.files import read_regular, strict_json, written
from serving.dialects.python.requests import Message, PictureLike, chat_request

FORMAT: Final = "enginecast conversation"
VERSION: Final = 1
BYTES: Final = 64 << 20
"""The largest file: three times what a request to a server may have."""


@dataclass(frozen=True, eq=False)
class Turn(Message):
    """A message; an answer may have been stopped before its end."""

    stopped: bool = False

    @property
    def parts(self) -> Sequence[str | PictureLike]:
        """Its texts and pictures in order."""
        return [self.content] if isinstance(self.content, str) else self.content


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Part(_Strict):
    text: str | None = None
    image: str | None = None

    @field_validator("image")
    @classmethod
    def _base64(cls, image: str | None) -> str | None:
        base64.b64decode(image or "", validate=True)  # its error is a ValueError
        return image

    @model_validator(mode="after")
    def _one(self) -> _Part:
        if (self.text is None) == (self.image is None):
            raise ValueError("expected either a text or an image")
        return self

    @property
    def content(self) -> str | bytes:
        return base64.b64decode(self.image or "") if self.text is None else self.text


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: tuple[_Part, ...]
    stopped: bool = False


class _File(_Strict):
    format: Literal["enginecast conversation"]
    version: Literal[1]
    model: str = ""
    messages: tuple[_Message, ...]


def save(path: Path, model: str, turns: Sequence[Turn]) -> None:
    """Write a conversation; the file has its name only once it is complete. A file that is there is replaced if it is a
    conversation, too. Raises InvalidInput for another file or a conversation too large, OSError, ResourceExhausted.
    """
    if path.exists():
        load(path)  # raises for what is none
    said = [{"role": turn.role, "content": tuple(map(_part, turn.parts)), "stopped": turn.stopped} for turn in turns]
    messages = tuple(map(_Message.model_validate, said))
    file = _File(format=FORMAT, version=VERSION, model=model, messages=messages)
    content = file.model_dump_json(exclude_defaults=True).encode()
    if len(content) > BYTES:
        raise InvalidInput(
            str(path), f"would have {len(content):,} bytes, expected at most {BYTES:,}: show less pictures"
        )
    with written(path) as target:
        target.write(content)


def load(path: Path) -> list[Turn]:
    """The messages of a file. Raises NotFound if it cannot be read, InvalidInput naming it if it is no conversation, of
    another version, or beyond the limits of requests.
    """
    try:
        content = read_regular(path, BYTES)
    except OSError as error:
        raise NotFound(f"conversation {path} cannot be read: {error.strerror}") from None
    try:
        raw = strict_json(content)
    except ValueError as error:
        raise InvalidInput(str(path), f"is no saved conversation: {error}") from None
    if isinstance(raw, dict) and raw.get("format") == FORMAT and raw.get("version") != VERSION:
        raise InvalidInput(
            str(path), f"has version {raw.get('version')!r}, expected {VERSION}: it is of another release"
        )
    try:
        found = _File.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInput(str(path), f"is no saved conversation: {where}: {first['msg']}") from None
    turns = [Turn(one.role, [part.content for part in one.content], one.stopped) for one in found.messages]
    try:
        chat_request([*turns, Message("user", "?")], (), {})
    except InvalidInput as error:
        raise InvalidInput(str(path), f"holds a conversation that no model may get: {error}") from None
    return turns


def _part(part: str | PictureLike) -> _Part:
    if isinstance(part, str):
        return _Part(text=part)
    assert isinstance(part, bytes), "pictures of a conversation are files"
    return _Part(image=base64.b64encode(part).decode())
