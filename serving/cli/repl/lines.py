"""Reads what is typed or piped: a line, or several that belong together.

A line that ends with a backslash goes on in the next one. What stands between triple quotes is one text of any number
of lines; they begin a line, or the value of a command.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from runtime.errors import InvalidInput
from serving.cli import terminal
from serving.cli.repl.completing import Words, bind
from serving.cli.repl.history import History

PROMPT, MORE = "> ", "... "
QUOTES: Final = '"""'
OPENING: Final = re.compile(rf"\s*(/\S+\s+(\S+\s+)?)?{QUOTES}")
"""What stands before the text of a block: nothing, or a command such as `/set system`."""
BACKSLASHES: Final = re.compile(r"\\+$")

Read = Callable[[str], str]
"""Reads a line behind a prompt, without its end. Raises EOFError."""


def whole(read: Read) -> str:
    """A line with those that belong to it. Raises EOFError, and InvalidInput for a block that is not closed."""
    line = read(PROMPT)
    if opening := OPENING.match(line):
        return opening[0].removesuffix(QUOTES) + _block(line[opening.end() :], read)
    lines = [line]
    while _goes_on(lines[-1]):
        lines[-1] = lines[-1][:-1]
        lines.append(_next(read) or "")
    return "\n".join(lines)


def _goes_on(line: str) -> bool:
    """Whether it ends with a backslash that no other one escapes."""
    found = BACKSLASHES.search(line)
    return found is not None and len(found[0]) % 2 == 1


def _next(read: Read) -> str | None:
    try:
        return read(MORE)
    except EOFError:
        return None


def _block(line: str, read: Read) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(QUOTES):
        if (more := _next(read)) is None:
            raise InvalidInput(QUOTES, f"is not closed: end the text with {QUOTES}")
        lines.append(more)
    return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix(QUOTES)]).strip("\n")


def piped() -> Iterator[str]:
    """The lines of standard input. Raises InvalidInput where it is no UTF-8."""

    def read(_: str) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decoded(line).rstrip("\r\n")

    while True:
        try:
            yield whole(read)
        except EOFError:
            return


def rest(most: int) -> str:
    """All of standard input. Raises InvalidInput where it is no UTF-8, or has more than so many characters."""
    content = sys.stdin.buffer.read(4 * most + 1)  # a character has at most 4 bytes
    if len(content) > 4 * most or len(text := decoded(content)) > most:
        raise InvalidInput("standard input", f"has more than {most:,} characters, expected less")
    return text


def decoded(content: bytes) -> str:
    """The text of standard input. Raises InvalidInput where it is no UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidInput("standard input", "is no valid UTF-8 text") from None


class Typed:
    """Lines typed at a terminal, with the keys and the history of readline where there is one. `keep` asks whether a
    line is to be remembered; `words` are what the Tab key knows besides files.

    Ctrl-D ends them. Ctrl-C clears the line; a second one on an empty line ends them.
    """

    def __init__(self, history: History, keep: Callable[[], bool], words: Words) -> None:
        self._history, self._keep = history, keep
        self._readline = _readline()
        if self._readline is not None:
            self._readline.set_auto_history(False)
            bind(self._readline, words)
            for line in history.lines:
                self._readline.add_history(line)
        if history.problem:
            terminal.report(f"note: the history is not kept: {history.problem}")

    def __iter__(self) -> Iterator[str]:
        pressed = False
        while True:
            try:
                line = whole(self._read)
            except EOFError:
                terminal.errors.print()
                return
            except KeyboardInterrupt:
                empty = self._readline is None or not self._readline.get_line_buffer()
                terminal.errors.print()
                if pressed and empty:
                    return
                pressed = empty
                if empty:
                    terminal.report("Ctrl-C again or Ctrl-D ends.")
            except InvalidInput as error:
                terminal.report(f"enginecast: {error}")
            else:
                pressed = False
                yield line

    def _read(self, prompt: str) -> str:
        if not sys.stdout.isatty():  # `input` would write the prompt there
            terminal.errors.print(prompt, end="", markup=False)
            prompt = ""
        line = input(prompt)
        if self._keep():
            before = len(self._history.lines)
            self._history.add(line)
            if self._readline is not None and len(self._history.lines) > before:
                self._readline.add_history(line)
        return line


def _readline() -> Any:
    """The module, None where Python has none."""
    try:
        import readline
    except ImportError:
        return None
    return readline
