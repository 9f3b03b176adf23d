"""Scripts change what becomes of a request. They run where its model runs, in the generator that is its pipeline.

A request names its scripts, with arguments for each. Only installed ones can be named (`runtime.scripting`). The first
one that a request names is the outermost: it sees what the others make of the request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from runtime.errors import NotFound
from runtime.pipeline import Event, Pipeline, through

if TYPE_CHECKING:
    from runtime.placing.loading import LoadedModel

A = TypeVar("A", bound=BaseModel)

Make = Callable[[Any], Pipeline]
"""Checks a request and returns the generator that runs it, further scripts included. Raises InvalidInput."""


@dataclass(frozen=True)
class Folders:
    """What the user of this process gives scripts: a folder of `wildcards`, a `styles` file."""

    wildcards: Path | None = None
    styles: Path | None = None

    def check(self) -> None:
        """Raise NotFound for what is not there."""
        if self.wildcards is not None and not self.wildcards.is_dir():
            raise NotFound(f"there is no folder of wildcards {self.wildcards}: check --wildcards")
        if self.styles is not None and not self.styles.is_file():
            raise NotFound(f"there is no file of styles {self.styles}: check --styles")


class Arguments(BaseModel):
    """Base class of the arguments of scripts; itself, no arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Script(Generic[A]):
    """What a script does. One is made for each request that names it, with its validated `arguments`.

    `takes` is the class of the arguments, `tasks` are the names of the tasks whose requests it may be of, none for all
    of them. Methods raise subclasses of EnginecastError, such as InvalidInput, whose texts the caller sees; any other
    exception becomes a ScriptError that names the script. They run in the thread of the model, which waits for them.
    """

    summary: ClassVar[str] = ""
    takes: ClassVar[type[BaseModel]] = Arguments
    tasks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, arguments: A, folders: Folders) -> None:
        self.arguments, self.folders = arguments, folders

    @classmethod
    def loaded(cls, model: LoadedModel) -> Sequence[str]:
        """A model was loaded. Returns notes on it, which its status and its results show."""
        return ()

    def before(self, request: Any) -> Any:
        """The request to run instead of this one. Called while the request is checked, before it waits."""
        return request

    def during(self, event: Event) -> Iterable[Event]:
        """The events in the place of one of the pipeline's: none leaves it out."""
        return (event,)

    def after(self) -> Iterable[Event]:
        """Further events, when the pipeline has ended without an error."""
        return ()

    def open(self, request: Any, make: Make) -> Pipeline:
        """Check the request and return the generator that runs it, by default `make` of what `before` returns, with
        `during` and `after`. A script that runs several pipelines, or none, overrides this.
        """
        return self._through(make(self.before(request)))

    def _through(self, pipeline: Pipeline) -> Pipeline:
        yield from through(pipeline, self.during)
        yield from self.after()
