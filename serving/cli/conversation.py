"""A conversation at the terminal: questions go to the model, lines that begin with / are commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from runtime.errors import EnginecastError, InvalidInput
from serving.cli import terminal
from serving.dialects.python.requests import Message

COMMANDS: Final = {
    "/image PATH": "show a picture with the next question",
    "/clear": "forget all messages and pictures",
    "/help": "list these commands",
    "/quit": "end, as Ctrl-D does",
}
QUIT: Final = ("/quit", "/exit", "quit", "exit")

Chat = Callable[[Sequence[Message]], str]
"""Sends the conversation so far, prints the answer and returns it."""


class Conversation:
    """The messages so far, and the pictures of the next question."""

    def __init__(self, pictures: list[bytes], chat: Chat) -> None:
        self.messages: list[Message] = []
        self.pictures, self._chat = pictures, chat

    def ask(self, question: str) -> None:
        """Send a question with the pictures shown. Where no answer comes, the conversation and the pictures stay as
        they were.
        """
        question = terminal.unicode("prompt", question)
        messages = [*self.messages, Message("user", [*self.pictures, question])]
        answer = self._chat(messages)
        self.messages = [*messages, Message("assistant", answer)]
        self.pictures = []

    def run(self, lines: Iterator[str], patient: bool) -> None:
        """Take lines until they end or one quits. A `patient` conversation reports errors and continues; another one
        raises them.
        """
        for line in lines:
            text = line.strip()
            if text in QUIT:
                return
            try:
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self.ask(text)
            except (EnginecastError, KeyboardInterrupt) as error:
                if not patient:
                    raise
                terminal.errors.print(
                    f"enginecast: {error}" if str(error) else "\ninterrupted", markup=False, soft_wrap=True
                )

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name == "/image" and argument.strip():
            self.pictures.append(terminal.read_image(Path(argument.strip()).expanduser()))
        elif name == "/clear":
            self.messages = []
            self.pictures = []
        elif name == "/help":
            terminal.errors.print(help_text(), markup=False)
        else:
            known = ", ".join(COMMANDS)
            raise InvalidInput(
                name, "needs the PATH of a picture" if name == "/image" else f"is no command, expected one of {known}"
            )


def help_text() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    return "\n".join(f"{name:<{width}}  {what}" for name, what in COMMANDS.items())


def typed() -> Iterator[str]:
    """Lines typed after a prompt, or the lines of standard input where it is no terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):
        importlib.import_module("readline")  # gives `input` a history and keys to edit with
    while True:
        try:
            yield input("> ")
        except EOFError:
            terminal.errors.print()
            return
