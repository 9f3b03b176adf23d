"""A conversation with a chat model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final

import typer

from runtime import limits
from runtime.errors import ContextLengthExceeded, EnginecastError, InvalidInput
from runtime.tasks.chat import ChatDefaults, ChatRequest
from runtime.vision.images import decode_image
from serving.cli import terminal
from serving.cli.answering import Answering
from serving.cli.repl import inline, lines, saved, showing
from serving.cli.repl.loop import Command, Repl
from serving.cli.repl.saved import Turn
from serving.cli.repl.settings import Settings
from serving.cli.repl.stopping import Stopped, stopping
from serving.dialects.python.requests import PictureLike, chat_request

SHOWN: Final = 12
"""The most lines of a picture that is added."""


@dataclass(frozen=True)
class Talking:
    """Settings of a conversation besides those of an answer."""

    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None
    paths: Annotated[bool, typer.Option(help="Take picture files that questions name.")] = True


class Talk(Repl):
    """Questions and answers so far, and the pictures of the next question.

    An answer that Ctrl-C stopped stays in the conversation as far as it came, so that one can go on from it; without
    any text, the question is forgotten and its pictures are kept for the next one.
    """

    task: ClassVar[str] = ChatRequest.task
    greeting = "Ask"
    turns: Sequence[Turn] = ()
    pictures: Sequence[PictureLike] = ()

    @staticmethod
    def options() -> tuple[object, ...]:
        return Answering(), Talking()

    @staticmethod
    def request(settings: Settings) -> ChatRequest:
        request = chat_request([Turn("user", "?")], (), settings.of(Answering).given())
        request.sampling(ChatDefaults())  # checks the values
        return request

    def take(self, text: str) -> None:
        self.ask(self._parts(text))

    def once(self, prompt: str | None) -> None:
        """Ask once. What is piped in stands behind the prompt; files that it names are not read."""
        piped = "" if sys.stdin.isatty() else lines.rest(limits.TEXT.most).strip()
        asked = [] if prompt is None else self._parts(prompt)
        if not (prompt or "").strip() and not piped:
            raise InvalidInput("prompt", "is missing, and nothing is piped in: say what to ask")
        if asked and piped and isinstance(last := asked[-1], str):
            asked[-1] = f"{last}\n\n{piped}"
        elif piped:
            asked.append(piped)
        self.ask(asked)

    def _parts(self, text: str) -> list[str | PictureLike]:
        """The texts and pictures of a question."""
        if not self.settings.of(Talking).paths:
            return [text]
        parts, paths = inline.content(text)
        for path, picture in zip(paths, (part for part in parts if isinstance(part, bytes)), strict=True):
            self._added(path, picture)
        return parts

    def _added(self, path: Path, picture: bytes) -> None:
        terminal.report(f"added {path.name}")
        showing.show(decode_image(picture), self.screen.pictures, SHOWN)

    def ask(self, parts: Sequence[str | PictureLike]) -> None:
        """Send a question: texts and pictures, behind the pictures shown before. Where no answer comes, the
        conversation and these pictures stay as they were.
        """
        for part in parts:
            if isinstance(part, str):
                terminal.unicode("prompt", part)
        turns = [*self.turns, Turn("user", [*self.pictures, *parts])]
        speaker = terminal.Speaker(self.screen.verbose)
        given = self.settings.of(Answering).given()
        try:
            with stopping(lambda: self.session.chat_stream([*self._told(), *turns], **given)) as stream:
                speaker.speak(stream)
        except Stopped:
            if speaker.text.strip():
                self._keep(turns, speaker.text, stopped=True)
            raise
        self._keep(turns, speaker.text)

    def advice(self, error: EnginecastError) -> str:
        if isinstance(error, ContextLengthExceeded):
            return (
                "/clear forgets the conversation; /set context_overflow slide, or --context-overflow slide, leaves out "
                "its oldest turns"
            )
        return ""

    def commands(self) -> Sequence[Command]:
        return (
            Command("/image", "PATH", "show a picture with the next question", self._image),
            Command("/clear", "", "forget all messages and pictures", lambda _: self._forget()),
            Command("/save", "FILE", "write the conversation as JSON", self._save),
            Command("/load", "FILE", "go on with a conversation that /save wrote", self._load),
        )

    def shown(self) -> Mapping[str, Callable[[], str]]:
        return {
            **super().shown(),
            "system": lambda: self.settings.of(Talking).system or "no system message: /set system TEXT",
            "messages": lambda: "\n".join(map(_line, self.turns)) or "no messages yet",
        }

    def _told(self) -> list[Turn]:
        system = self.settings.of(Talking).system
        return [] if system is None else [Turn("system", system)]

    def _keep(self, turns: Sequence[Turn], answer: str, stopped: bool = False) -> None:
        self.turns = [*turns, Turn("assistant", answer, stopped)]
        self.pictures = ()

    def _forget(self) -> None:
        self.turns, self.pictures = (), ()

    def _image(self, argument: str) -> None:
        path = terminal.path("/image", argument, "the PATH of a picture")
        picture = terminal.read_image(path)
        self.pictures = [*self.pictures, picture]
        self._added(path, picture)

    def _save(self, argument: str) -> None:
        path = terminal.path("/save", argument)
        saved.save(path, self.name, [*self._told(), *self.turns])
        terminal.report(f"saved {len(self.turns)} messages in {path}")

    def _load(self, argument: str) -> None:
        turns = saved.load(terminal.path("/load", argument))
        told = [turn for turn in turns[:1] if turn.role == "system"]
        system = "".join(part for turn in told for part in turn.parts if isinstance(part, str))
        self.change(self.settings.set("system", system) if told else self.settings.unset("system"))
        self.turns, self.pictures = turns[len(told) :], ()
        terminal.report(f"loaded {len(self.turns)} messages")


def _line(turn: Turn) -> str:
    """A message for the eye: a picture is its size."""
    parts = (part if isinstance(part, str) else "[picture]" for part in turn.parts)
    return f"{turn.role}: {''.join(parts)}{' [stopped]' if turn.stopped else ''}"


REPL: Final = Talk
