"""Exams: what single checkpoints were trained to do, where a program can judge whether they do it right.

A package declares exams as entry points of the group `enginecast.exams`, each an `Exam` subclass without arguments. The
checkpoint of an exam is calibrated with the exam's own requests, compared and scored on its cases; every other
checkpoint with the general requests of its task.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Final

from runtime.errors import MissingDependency, NotFound
from runtime.files import key_of

GROUP: Final = "enginecast.exams"


@dataclass(frozen=True)
class Judged:
    """Whether a result is right, and in which of its parts: attributes of a picture, or the kind of a question."""

    right: bool
    parts: Mapping[str, bool]


@dataclass(frozen=True, eq=False)
class Case:
    """A request and the judge of its result: a picture, uint8 RGB [height, width, 3], or the text of an answer."""

    request: Any
    judge: Callable[[Any], Judged]


class Exam(ABC):
    """The exam of one checkpoint. `title` says what is counted; `size` is how many held-out cases are scored."""

    title: ClassVar[str]
    size: ClassVar[int]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The checkpoint's, as in the manifests of its bundles (`Manifest.source.fingerprint`)."""

    @abstractmethod
    def is_of(self, folder: Path) -> bool:
        """Whether a folder holds the checkpoint of this exam."""

    @abstractmethod
    def calibration(self, seed: int) -> Iterator[Any]:
        """Requests to calibrate with, without end; none of them is held out."""

    @abstractmethod
    def comparison(self, count: int, seed: int) -> Iterator[Any]:
        """Held-out requests on which a quantized model is compared with the float one, at least `count`."""

    @abstractmethod
    def cases(self, count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
        """Cases to judge, held out or not; equal seeds give equal cases."""

    @property
    def key(self) -> str:
        """Identifies the code that makes the requests: what was captured with other code is not reused."""
        return key_of(Path(inspect.getfile(type(self))).read_text())


@cache
def exams() -> tuple[Exam, ...]:
    """Every exam that is installed."""
    return tuple(exam for entry in entry_points(group=GROUP) if (exam := _loaded(entry)) is not None)


def _loaded(entry: EntryPoint) -> Exam | None:
    """An exam; None where its package is left out, as the wheel leaves out the samples. Raises MissingDependency."""
    try:
        return entry.load()()
    except ModuleNotFoundError as error:
        if error.name == entry.module.partition(".")[0]:
            return None
        raise MissingDependency(error.name or entry.module, "export") from None


def exam_of(fingerprint: str) -> Exam | None:
    """The exam of the checkpoint with this fingerprint."""
    return next((exam for exam in exams() if exam.fingerprint == fingerprint), None)


def find(fingerprints: Sequence[str], source: Path | None) -> Exam:
    """The one exam of these checkpoints, given by fingerprint and, if not None, by folder. Raises NotFound."""
    found = {exam_of(fingerprint) for fingerprint in fingerprints}
    if source is not None:
        found.add(next((exam for exam in exams() if exam.is_of(source)), None))
    if len(found) == 1 and (exam := found.pop()) is not None:
        return exam
    known = ", ".join(sorted(exam.title for exam in exams())) or "none; those of the samples are in a source checkout"
    raise NotFound(
        f"these models have no exam in common that a program can judge: expected models of one checkpoint with an exam "
        f"(installed: {known})"
    )
