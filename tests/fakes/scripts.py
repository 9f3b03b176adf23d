"""Scripts of an installed package, for tests of what they may do and what may go wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from runtime import scripting
from runtime.pipeline import Event, Note, Pipeline
from runtime.script import Arguments, Make, Script
from runtime.tasks.chat import TextDelta

CLOSED: list[str] = []
"""Scripts that were closed before they had ended."""


class Words(Arguments):
    word: str
    times: int = 1


class Marks(Script[Words]):
    """Puts a word before every piece of an answer, and before the prompt of a picture."""

    summary: ClassVar[str] = "Mark what comes."
    takes: ClassVar[type[Arguments]] = Words

    @classmethod
    def loaded(cls, model: Any) -> Sequence[str]:
        return [f"{model.task} can be marked"]

    def before(self, request: Any) -> Any:
        marked = self.arguments.word * self.arguments.times
        return replace(request, prompt=f"{marked} {request.prompt}") if hasattr(request, "prompt") else request

    def during(self, event: Event) -> Iterable[Event]:
        if isinstance(event, TextDelta):
            event = replace(event, text=f"{self.arguments.word * self.arguments.times}{event.text}")
        return (event,)

    def after(self) -> Iterable[Event]:
        return (Note(f"marked with {self.arguments.word}"),)


class Where(Arguments):
    where: str


class Fails(Script[Where]):
    """Fails by mistake, where it is told to."""

    takes: ClassVar[type[Arguments]] = Where

    def _fail(self, where: str) -> None:
        if self.arguments.where == where:
            raise KeyError("a mistake")

    def before(self, request: Any) -> Any:
        self._fail("before")
        return request if self.arguments.where != "request" else "no request"

    def during(self, event: Event) -> Iterable[Event]:
        self._fail("during")
        return (event,) if self.arguments.where != "event" else ("no event",)  # type: ignore[return-value]

    def after(self) -> Iterable[Event]:
        self._fail("after")
        return ()


class Watches(Script[Arguments]):
    """Tells when it is closed."""

    def open(self, request: Any, make: Make) -> Pipeline:
        return self._watch(make(request))

    def _watch(self, pipeline: Pipeline) -> Pipeline:
        try:
            yield from pipeline
        except GeneratorExit:
            CLOSED.append("watches")
            raise


NO_SCRIPT = 7
OWN = {
    "marks": "tests.fakes.scripts:Marks",
    "fails": "tests.fakes.scripts:Fails",
    "watches": "tests.fakes.scripts:Watches",
}


@contextmanager
def package(folder: Path, entries: Mapping[str, str] = OWN) -> Iterator[None]:
    """An installed package with these scripts."""
    about = folder / f"fake_{folder.name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{folder.name}\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {where}" for name, where in entries.items())
    (about / "entry_points.txt").write_text(f"[{scripting.GROUP}]\n{lines}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    scripting.installed.cache_clear()
    scripting.script_class.cache_clear()
