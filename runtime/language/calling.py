"""Calls of functions in the text of answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runtime.language.calls import CallForm
from runtime.language.text import StopStrings
from runtime.pipeline import Event, Pipeline, through
from runtime.tasks.chat import Finished, TextDelta, ToolCalled


def called(answered: Pipeline, form: CallForm) -> Pipeline:
    """Wrap a pipeline that answers: a call comes as a `ToolCalled` in the place of its text. One that is not whole,
    since a length or a stop string cut it, stays text.
    """
    found: dict[int, _Text] = {}

    def read(event: Event) -> Iterator[Event]:
        match event:
            case TextDelta():
                yield from found.setdefault(event.answer, _Text(form)).push(event)
            case Finished():
                yield from found.pop(event.answer, _Text(form)).end(event.answer)
                yield event
            case _:
                yield event

    return through(answered, read)


class _Text:
    """The text of one answer. What is held is not passed on yet: it may become a call, or is one."""

    def __init__(self, form: CallForm) -> None:
        self._form, self._mark = form, StopStrings([form.before])
        self._held, self._tokens = "", 0

    def push(self, delta: TextDelta) -> Iterator[TextDelta]:
        self._held += delta.text
        self._tokens += delta.tokens
        if self._mark.found:
            return
        text = self._mark.push(delta.text)
        self._held = self._held[len(text) :]
        if text:
            yield replace(delta, text=text, tokens=self._tokens)
            self._tokens = 0

    def end(self, answer: int) -> Iterator[Event]:
        call = self._form.read(self._held.removeprefix(self._form.before)) if self._mark.found else None
        if call is not None:
            yield ToolCalled(call, answer, self._tokens)
        elif self._held:
            yield TextDelta(self._held, answer, self._tokens)
