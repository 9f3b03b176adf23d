"""The scripts that are installed here, and requests that name some of them.

They are those in `runtime/scripts/`, found by listing the folder, and those that packages declare as entry points of
the group `enginecast.scripts`, each a `Script` subclass.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ValidationError

import runtime.scripts
from runtime import limits
from runtime.errors import EnginecastError, InvalidInput, ScriptError, did_you_mean, quoted
from runtime.listing import modules
from runtime.pipeline import Call, Event, Outputs, Pipeline
from runtime.script import Folders, Make, Script
from runtime.task import Request

if TYPE_CHECKING:
    from runtime.placing.loading import LoadedModel

log = logging.getLogger(__name__)

GROUP: Final = "enginecast.scripts"


@dataclass(frozen=True)
class Listed:
    """A script as clients see it: `arguments` is the JSON schema of its arguments, and `error` says why it cannot be
    used, "" if it can.
    """

    name: str
    summary: str = ""
    tasks: tuple[str, ...] = ()
    arguments: Mapping[str, Any] | None = None
    error: str = ""


class Scripts:
    """The installed scripts with what the user gives them."""

    def __init__(self, folders: Folders | None = None) -> None:
        self.folders = folders or Folders()
        self.folders.check()

    def open(self, make: Make, request: Request) -> Pipeline:
        """Check a request and return the generator that runs it, with its scripts; `make` is that without them. Raises
        InvalidInput for an unknown script or argument, and the errors of scripts.
        """
        for name, script in reversed(self._chosen(request)):
            make = _Guarded(name, script, make, request.task).open
        return make(request)

    def loaded(self, model: LoadedModel) -> list[str]:
        """Tell every script that a model was loaded; returns their notes. Raises ScriptError."""
        notes = list[str]()
        for name in installed():
            with _blamed(name):
                notes += script_class(name).loaded(model)
        return notes

    def listed(self) -> list[Listed]:
        """Every installed script, sorted by name."""
        return [_listed(name) for name in sorted(installed())]

    def _chosen(self, request: Request) -> list[tuple[str, Script[Any]]]:
        limits.SCRIPTS.length("scripts", request.scripts)
        return [(name, self._script(name, given, request.task)) for name, given in request.scripts.items()]

    def _script(self, name: str, given: Mapping[str, Any], task: str) -> Script[Any]:
        limits.NAME.length("scripts", name)
        if name not in installed():
            raise InvalidInput("scripts", f"{quoted(name)} is not installed here: {did_you_mean(name, installed())}")
        kind = script_class(name)
        if kind.tasks and task not in kind.tasks:
            raise InvalidInput(f"scripts.{name}", f"is for requests of the task {' or '.join(kind.tasks)}, not {task}")
        arguments = _arguments(name, kind.takes, given)
        with _blamed(name):
            return kind(arguments, self.folders)


class _Guarded:
    """A script of a request whose errors name it. Those of what it wraps pass as they are."""

    def __init__(self, name: str, script: Script[Any], make: Make, task: str) -> None:
        self._name, self._script, self._make, self._task = name, script, make, task
        self._passing = list[BaseException]()

    def open(self, request: Any) -> Pipeline:
        with _blamed(self._name, self._passing):
            return self._run(self._script.open(request, self._inner))

    def _run(self, pipeline: Pipeline) -> Pipeline:
        outputs: Outputs | None = None
        with _blamed(self._name, self._passing), closing(pipeline), suppress(StopIteration):
            while True:
                item = pipeline.send(outputs)
                if not isinstance(item, Call | Event):
                    raise ScriptError(f"script {quoted(self._name)} made a {type(item).__name__}, expected an Event")
                outputs = yield item

    def _inner(self, request: Any) -> Pipeline:
        if not isinstance(request, Request) or request.task != self._task:
            raise ScriptError(f"script {quoted(self._name)} made no request of the task {self._task} from one")
        with self._noting():
            return self._noted(self._make(request))

    def _noted(self, pipeline: Pipeline) -> Pipeline:
        with self._noting():
            yield from pipeline

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._passing.append(error)
            raise


@contextmanager
def _blamed(name: str, passing: Sequence[BaseException] = ()) -> Iterator[None]:
    """Raise ScriptError that names the script for what it raised by mistake."""
    try:
        yield
    except (EnginecastError, MemoryError):
        raise
    except Exception as error:
        if any(error is one for one in passing):
            raise
        log.exception("script %s failed", name)
        raise ScriptError(
            f"script {quoted(name)} failed ({type(error).__name__}: {error}): the log of the process that runs the "
            "model says where. Leave the script out, or repair it"
        ) from error


def _arguments(name: str, takes: type[BaseModel], given: Any) -> BaseModel:
    """The validated arguments. Raises InvalidInput that names the first wrong one."""
    if not isinstance(given, Mapping):
        raise InvalidInput(f"scripts.{name}", f"is {given!r:.100}, expected arguments by name")
    limits.SCRIPT_ARGUMENTS.length(f"scripts.{name}", json.dumps(dict(given), default=str))
    for argument in given:
        if argument not in takes.model_fields:
            known = did_you_mean(str(argument), takes.model_fields) if takes.model_fields else "it has none"
            raise InvalidInput(f"scripts.{name}", f"has no argument {quoted(str(argument))}: {known}")
    try:
        return takes.model_validate(dict(given))
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(["scripts", name, *map(str, found["loc"])])
        raise InvalidInput(place, found["msg"].removeprefix("Value error, ")) from None


@cache
def installed() -> dict[str, EntryPoint | type[Script[Any]]]:
    """Every installed script by name: its class, or the entry point that has it. Raises ScriptError where two have the
    same name.
    """
    found: dict[str, EntryPoint | type[Script[Any]]] = {
        module.__name__.rpartition(".")[2]: module.SCRIPT for module in modules(runtime.scripts)
    }
    for entry in entry_points(group=GROUP):
        if entry.name in found:
            raise ScriptError(f"there are two scripts {quoted(entry.name)}: uninstall the package {_package(entry)}")
        found[entry.name] = entry
    return found


@cache
def script_class(name: str) -> type[Script[Any]]:
    """The class of an installed script. Raises ScriptError if it cannot be imported."""
    found = installed()[name]
    if not isinstance(found, EntryPoint):
        return found
    try:
        loaded = found.load()
    except Exception as error:
        log.exception("script %s cannot be imported", name)
        raise ScriptError(
            f"script {quoted(name)} cannot be imported ({type(error).__name__}: {error}): repair or uninstall the "
            f"package {_package(found)}"
        ) from error
    if not (inspect.isclass(loaded) and issubclass(loaded, Script)):
        raise ScriptError(
            f"script {quoted(name)} is no subclass of Script: repair or uninstall the package {_package(found)}"
        )
    return loaded


def _listed(name: str) -> Listed:
    try:
        kind = script_class(name)
    except ScriptError as error:
        return Listed(name, error=str(error))
    with _blamed(name):
        return Listed(name, kind.summary, kind.tasks, kind.takes.model_json_schema())


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
