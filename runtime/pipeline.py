"""A pipeline is a generator that yields engine calls and events. Each call's outputs are sent back to it.

    def pipeline() -> Pipeline:
        hidden = yield Call("text_encoder", {"input_ids": ids})
        yield Progress(step=1, total=20)

A pipeline holds no engine. `drive` runs the calls of one pipeline, `tap` observes them; a server may batch the calls of
many. Closing the generator cancels the work before the next call.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

import runtime.pipelines
from runtime.bundle.signature import Array
from runtime.engine import Engine, Slot, SlotCall, run_alone
from runtime.kept import Kept
from runtime.listing import modules

Outputs = dict[str, Array]


@dataclass(frozen=True)
class Call:
    """Run a submodel on these inputs. `slot` holds the states (KV caches) to use. `keep` first truncates them to this
    number of positions. A new slot can start as a copy of another one, its `origin`. A decoder returns outputs for the
    `last` new positions.
    """

    submodel: str
    inputs: Mapping[str, Array]
    slot: Slot | None = None
    keep: int | None = None
    origin: Slot | None = None
    last: int = 1


class Event:
    """A report of a pipeline: base class of `Progress` and of the events in `runtime/tasks/`.

    `output` is true for events with a part of the result.
    """

    output: ClassVar[bool] = False

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures in the event."""
        return 0

    @property
    def counts(self) -> Mapping[str, int]:
        """What the event adds to the counts of its model, such as {"pictures": 1}."""
        return {}


@dataclass(frozen=True)
class Progress(Event):
    """`step` of `total` is done. `preview` is a uint8 RGB picture [height, width, 3] if the request wants previews."""

    step: int
    total: int
    preview: Array | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.preview is None else int(self.preview.nbytes)

    @property
    def counts(self) -> Mapping[str, int]:
        return {"steps": 1}


@dataclass(frozen=True)
class Reused(Event):
    """Outputs of `calls` calls of a submodel were held in memory: the calls were not made."""

    submodel: str
    calls: int = 1


@dataclass(frozen=True)
class Note(Event):
    """A sentence on how a request was run, which stands among the notes of its result."""

    text: str


Pipeline = Generator[Call | Event, Outputs | None, None]
_Step = Generator[Call | Event, Outputs | None, Outputs | None]
"""What takes the place of one call or event of a pipeline."""


@dataclass(frozen=True)
class Room:
    """Bytes of memory for what further requests may use again: `features` of pictures and of texts, and `prefixes` of
    conversations. A decoder's states take `position` bytes for each position of a sequence.
    """

    features: int = 0
    prefixes: int = 0
    position: int = 0


@dataclass(frozen=True)
class Example:
    """A small request to try a model with. `what` describes it in messages, as in "a picture".

    A model that refuses an `optional` example can be used anyway.
    """

    what: str
    request: Any
    optional: bool = False


class ModelPipeline(ABC):
    """An algorithm that runs the requests of one model. Each file in `runtime/pipelines/` has one subclass.

    `name` is the value of `Manifest.pipeline`, `task` the name of the task whose requests it runs.
    """

    name: ClassVar[str]
    task: ClassVar[str]

    @classmethod
    @abstractmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> Self:
        """Open a bundle's pipeline from its folder and `Manifest.config`. Raises BundleError if they do not fit."""

    @classmethod
    def abilities(cls, root: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """What requests to a bundle may ask for, by name, as JSON: for programs that offer it to people. Nothing is
        loaded. Raises BundleError if folder and `Manifest.config` do not fit.
        """
        return {}

    @property
    @abstractmethod
    def origins(self) -> Mapping[str, str]:
        """The origin of each input of the submodels, by name, for messages: a field of a file, or another submodel."""

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """Requests to try a model with before it is built. Together they use all of the model's files."""

    def keep_within(self, room: Mapping[str, float]) -> Sequence[str]:
        """Split calls whose inputs have more bytes than `room` allows, by submodel, if the algorithm can. Returns notes
        on the difference that this makes.
        """
        return ()

    def remember(self, room: Room) -> None:
        """Hold what further requests may use again, such as features of pictures, if the algorithm has something of the
        kind. Nothing is held until this is called.
        """

    def prepare(self) -> None:
        """Read what a first request of some kind would wait for. Called where models run before they are ready."""

    @abstractmethod
    def __call__(self, request: Any, /) -> Pipeline:
        """Check a request and return the generator that runs it. Raises InvalidInput."""


@cache
def pipelines() -> dict[str, type[ModelPipeline]]:
    """Every pipeline by name: the classes in `runtime/pipelines/`."""
    found = [
        each
        for module in modules(runtime.pipelines)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, ModelPipeline) and each.__module__ == module.__name__
    ]
    return {pipeline.name: pipeline for pipeline in found}


class Engines(Protocol):
    """Maps a submodel's name to its engine."""

    def __getitem__(self, submodel: str, /) -> Engine: ...


def prepare(engine: Engine, call: Call) -> None:
    """Bring the slot of a call to what the call continues."""
    if call.slot is not None and call.origin is not None:
        engine.copy(call.origin, call.slot)
    if call.slot is not None and call.keep is not None:
        engine.trim(call.slot, call.keep)


def run_call(engines: Engines, call: Call) -> Outputs:
    """Run one call on its engine."""
    engine = engines[call.submodel]
    prepare(engine, call)
    return run_alone(engine, SlotCall(call.inputs, call.slot, call.last))


def drive(pipeline: Pipeline, engines: Engines) -> Generator[Event, None, None]:
    """Run the calls of one pipeline and yield its events. Closing this generator closes the pipeline."""
    return answer(pipeline, partial(run_call, engines))


def answer(pipeline: Pipeline, execute: Callable[[Call], Outputs]) -> Generator[Event, None, None]:
    """`drive` with a function in place of engines: `execute` returns the outputs of a call."""
    outputs: Outputs | None = None
    with closing(pipeline), suppress(StopIteration):
        while True:
            item = pipeline.send(outputs)
            outputs = None
            if isinstance(item, Call):
                outputs = execute(item)
            else:
                yield item


def reusing(pipeline: Pipeline, submodels: Collection[str], kept: Kept[bytes, Outputs]) -> Pipeline:
    """Wrap a pipeline: calls of these submodels, none of which has states, are not made again while their outputs are
    kept. Yields a `Reused` for each that is left out.
    """

    def step(item: Call | Event) -> _Step:
        if not isinstance(item, Call) or item.submodel not in submodels:
            return (yield item)
        key = _content(item)
        outputs = kept.get(key)
        if outputs is not None:
            yield Reused(item.submodel)
            return outputs
        outputs = yield item
        assert outputs is not None, "a driver answers a call with its outputs"
        kept.put(key, outputs, sum(array.nbytes for array in outputs.values()))
        return outputs

    return _wrapped(pipeline, step)


def _wrapped(pipeline: Pipeline, step: Callable[[Call | Event], _Step]) -> Pipeline:
    """Wrap a pipeline: `step` yields what takes the place of each of its calls and events, and returns the outputs of a
    call.
    """
    outputs: Outputs | None = None
    with closing(pipeline), suppress(StopIteration):
        while True:
            outputs = yield from step(pipeline.send(outputs))


def _content(call: Call) -> bytes:
    """A hash of a call: of its submodel and its inputs."""
    digest = hashlib.sha256(call.submodel.encode())
    for name, array in sorted(call.inputs.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def through(pipeline: Pipeline, replaced: Callable[[Event], Iterable[Event]]) -> Pipeline:
    """Wrap a pipeline: `replaced` returns the events in the place of each."""

    def step(item: Call | Event) -> _Step:
        if isinstance(item, Call):
            return (yield item)
        yield from replaced(item)
        return None

    return _wrapped(pipeline, step)


def tap(pipeline: Pipeline, seen: Callable[[Call, Outputs], Outputs]) -> Pipeline:
    """Wrap a pipeline: `seen` is called with every call and its outputs, and returns the outputs for the pipeline."""

    def step(item: Call | Event) -> _Step:
        outputs = yield item
        if not isinstance(item, Call):
            return None
        assert outputs is not None, "a driver answers a call with its outputs"
        return seen(item, outputs)

    return _wrapped(pipeline, step)
