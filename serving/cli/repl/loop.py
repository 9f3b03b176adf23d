"""The loop at the terminal: each line is a request to the model, or a command that begins with /."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

import typer

from runtime.errors import EnginecastError, InvalidInput, did_you_mean
from runtime.files import file_error
from runtime.task import Request
from serving.cli import terminal
from serving.cli.options import ShownPictures
from serving.cli.repl.completing import Words
from serving.cli.repl.history import History
from serving.cli.repl.inline import begins_with_one
from serving.cli.repl.lines import Typed
from serving.cli.repl.settings import Settings
from serving.cli.repl.showing import check_way
from serving.dialects.python.session import Session

BYE: Final = ("/quit", "/bye", "/exit", "quit", "exit")

About = Callable[[], Mapping[str, str]]
"""What is known of the model, by a name each. Raises EnginecastError."""


@dataclass(frozen=True)
class Command:
    """A line that begins with `name`. `run` gets the rest of it, which is as `argument` says."""

    name: str
    argument: str
    help: str
    run: Callable[[str], None]


@dataclass(frozen=True)
class Screen:
    """Settings of the loop itself."""

    verbose: Annotated[bool, typer.Option(help="Say what each submodel ran on, and how long.")] = False
    history: Annotated[bool, typer.Option(help="Remember lines for later sessions.")] = True
    pictures: ShownPictures = "auto"


class Repl(ABC):
    """Takes lines for one model. A file in `serving/cli/repl/tasks/` declares a subclass as `REPL`.

    `settings` begins as given and is changed by /set. Raises InvalidInput for settings that no model could have.
    """

    task: ClassVar[str]
    """The task of the models that it is for."""
    greeting: ClassVar[str]
    """What one does with them, as an imperative that the model's name follows."""

    def __init__(self, session: Session, name: str, about: About, settings: Settings) -> None:
        self.session, self.name = session, name
        self._about = about
        self.change(settings)

    @staticmethod
    @abstractmethod
    def options() -> tuple[object, ...]:
        """The groups of settings besides `Screen`, as they are by default."""

    @staticmethod
    @abstractmethod
    def request(settings: Settings) -> Request:
        """A request as lines make them. Raises InvalidInput for settings that exclude each other."""

    @abstractmethod
    def take(self, text: str) -> None:
        """Send a request of a line. Raises EnginecastError, and KeyboardInterrupt where Ctrl-C stopped it."""

    @abstractmethod
    def once(self, prompt: str | None) -> None:
        """Do what a prompt asks, or what is piped in. Raises as `take` does, and InvalidInput without either."""

    def commands(self) -> Sequence[Command]:
        """The commands besides those of every task."""
        return ()

    def shown(self) -> Mapping[str, Callable[[], str]]:
        """What /show shows, by its name."""
        return {"settings": self._settings_text, "info": lambda: _table(self._about())}

    def words(self) -> Words:
        """The commands, and what each takes."""
        taken: dict[str, Callable[[], Iterable[str]]] = {
            **dict.fromkeys(("/set", "/unset"), lambda: [name for name, _, _ in self.settings.rows()]),
            "/show": self.shown,
        }
        return {command.name: taken.get(command.name) for command in self._all()} | dict.fromkeys(BYE[:3])

    @property
    def screen(self) -> Screen:
        return self.settings.of(Screen)

    def begin(self, prompt: str | None = None) -> None:
        """Do what a prompt asks, or what is piped in; else take lines from the terminal until Ctrl-D or /quit, where
        errors are shown and the next line is read.
        """
        if prompt is not None or not sys.stdin.isatty():
            self.once(prompt)
            return
        terminal.report(f"{self.greeting} {self.name}. /help lists commands, Ctrl-D ends.")
        self.run(Typed(History(self.task), lambda: self.screen.history, self.words()), patient=True)

    def run(self, lines: Iterable[str], patient: bool) -> None:
        """Take lines until they end or one says goodbye. A `patient` loop reports errors and goes on; another one
        raises them.
        """
        for line in lines:
            text = line.strip()
            if text in BYE:
                return
            try:
                if text.startswith("/") and not begins_with_one(text):
                    self._command(text)
                elif text:
                    self.take(text)
            except KeyboardInterrupt:
                if not patient:
                    raise
                terminal.report("\nstopped")
            except (EnginecastError, OSError) as error:
                if not patient:
                    raise
                self._report(error)

    def change(self, settings: Settings) -> None:
        """Take other settings. Raises InvalidInput, and keeps those it has, for settings that exclude each other."""
        check_way(settings.of(Screen).pictures)
        self.request(settings)
        self.settings = settings

    def advice(self, error: EnginecastError) -> str:
        """What to do about an error here, behind its message; nothing if that says it."""
        return ""

    def _report(self, error: EnginecastError | OSError) -> None:
        known = error if isinstance(error, EnginecastError) else file_error(error)
        advice = self.advice(known)
        terminal.report(f"enginecast: {' '.join(str(known).split())}{f'. {advice}' if advice else ''}")

    def _command(self, text: str) -> None:
        name, *rest = text.split(maxsplit=1)
        known = {command.name: command for command in self._all()}
        if name not in known:
            raise InvalidInput(name, f"is no command: {did_you_mean(name, [*known, *BYE[:3]])}")
        known[name].run(rest[0] if rest else "")

    def _all(self) -> list[Command]:
        return [
            Command("/set", "NAME VALUE", "change a setting; /show lists them", self._set),
            Command("/unset", "NAME", "back to the default", lambda name: self.change(self.settings.unset(name))),
            Command("/show", f"[{'|'.join(self.shown())}]", "show the settings, or what is named", self._show),
            *self.commands(),
            Command("/help", "", "list these commands", lambda _: terminal.report(self._help())),
        ]

    def _set(self, argument: str) -> None:
        name, *value = argument.split(maxsplit=1)[:2] or [""]
        if not value:
            raise InvalidInput("/set", "needs NAME VALUE; /show settings lists the names, /unset NAME undoes it")
        self.change(self.settings.set(name, terminal.unicode(name, value[0])))

    def _show(self, what: str) -> None:
        shown = self.shown()
        if what and what not in shown:
            raise InvalidInput("/show", f"knows no '{what}': {did_you_mean(what, shown)}")
        terminal.report(shown[what or "settings"]())

    def _settings_text(self) -> str:
        rows = list(self.settings.rows())
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:<{width}}  {value or '-':<8}  {help}" for name, value, help in rows)

    def _help(self) -> str:
        usages = {f"{one.name} {one.argument}".strip(): one.help for one in self._all()}
        return _table(usages | {"/quit": "end, as /bye, /exit and Ctrl-D do"})


def _table(rows: Mapping[str, str]) -> str:
    """Names and what belongs to them, a line each."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {what}" for name, what in rows.items())
