"""A toy task: numbers come back scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from runtime.errors import InvalidInput
from runtime.pipeline import Event
from runtime.task import Request, Task


@dataclass(frozen=True)
class ScaleRequest(Request):
    task: ClassVar[str] = "scale"
    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.numbers:
            raise InvalidInput("numbers", "is empty, expected one number or more")


@dataclass(frozen=True)
class Scaled(Event):
    output: ClassVar[bool] = True
    numbers: tuple[float, ...]


TASK: Final = Task(ScaleRequest, verb="scale")
