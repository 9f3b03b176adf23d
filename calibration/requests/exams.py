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

from runtime.errors import MissingDependency, NotFound, did_you_mean
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


@dataclass(frozen=True)
class Ability:
    """Something else that a checkpoint can do: what is counted, how many held-out cases are scored, and the cases, as
    of `Exam.cases`.
    """

    title: str
    size: int
    cases: Callable[[int, int, bool], Sequence[Case]]


class Exam(ABC):
    """The exam of one checkpoint. `title` says what is counted; `size` is how many held-out cases are scored.

    `abilities` are scored on cases of their own, by name. `additions` are what the checkpoint has besides its own
    files, paths by kind and name: the exam belongs to bundles that were built with just these.
    """

    title: ClassVar[str]
    size: ClassVar[int]
    abilities: ClassVar[Mapping[str, Ability]] = {}
    additions: ClassVar[Mapping[str, Mapping[str, Path]]] = {}

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

    def variants(self) -> Sequence[Exam]:
        """Exams of the same checkpoint with additions."""
        return ()

    @property
    def key(self) -> str:
        """Identifies the code that makes the requests: what was captured with other code is not reused."""
        return key_of(Path(inspect.getfile(type(self))).read_text())


@cache
def exams() -> tuple[Exam, ...]:
    """Every exam that is installed, and its variants."""
    found = [exam for entry in entry_points(group=GROUP) if (exam := _loaded(entry)) is not None]
    return tuple(one for exam in found for one in (exam, *exam.variants()))


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


def find(fingerprints: Sequence[str], source: Path | None, ability: str = "") -> Exam:
    """The one exam of these checkpoints, given by fingerprint and, if not None, by folder, that has the ability, if one
    is named; of several, the one with the fewest additions. Raises NotFound.
    """
    fitting = [
        exam
        for exam in exams()
        if all(exam.fingerprint == one for one in fingerprints) and (source is None or exam.is_of(source))
    ]
    if not fitting:
        known = ", ".join(sorted({exam.title for exam in exams()}))
        raise NotFound(
            "these models have no exam in common that a program can judge: expected models of one checkpoint with an "
            f"exam (installed: {known or 'none; those of the samples are in a source checkout'})"
        )
    able = [exam for exam in fitting if not ability or ability in exam.abilities]
    if not able:
        names = {name for exam in fitting for name in exam.abilities}
        others = did_you_mean(ability, names) if names else f"they are scored in {fitting[0].title} alone"
        raise NotFound(f"these models have no exam of '{ability}': {others}")
    return min(able, key=lambda exam: len(exam.additions))
