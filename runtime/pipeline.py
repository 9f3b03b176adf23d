"""What a pipeline is: a generator that yields engine calls and events, and is sent each call's outputs.

    def pipeline() -> Pipeline:
        hidden = yield Call("text_encoder", {"input_ids": ids})
        yield Progress(step=1, total=20)

It never touches an engine. `drive` runs the calls of one pipeline; a server may gather the calls of many into batches.
Closing the generator cancels the work at the next call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import runtime.pipelines
from runtime.bundle.signature import Array
from runtime.engine import Engine, Slot
from runtime.listing import modules

Outputs = dict[str, Array]


@dataclass(frozen=True)
class Call:
    """Run a submodel on these inputs. `slot` names the states to use; `keep` forgets those beyond that many positions
    first.
    """

    submodel: str
    inputs: Mapping[str, Array]
    slot: Slot | None = None
    keep: int | None = None


class Event:
    """Something that a pipeline reports: base of `Progress`, and of the events in `runtime/tasks/`.

    `output` says that it carries a part of the result.
    """

    output: ClassVar[bool] = False

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures that it holds."""
        return 0


@dataclass(frozen=True)
class Progress(Event):
    """`step` of `total` is done. `preview` is a uint8 RGB picture [height, width, 3] when asked for."""

    step: int
    total: int
    preview: Array | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.preview is None else int(self.preview.nbytes)


Pipeline = Generator[Call | Event, Outputs | None, None]


@dataclass(frozen=True)
class Example:
    """A small request that a pipeline's model should answer. `what` names what is special about it, as in "a picture".

    A model that refuses an `optional` one can be used all the same.
    """

    what: str
    request: Any
    optional: bool = False


class ModelPipeline(ABC):
    """An algorithm that answers the requests of one model: one class per file in `runtime/pipelines/`.

    `name` is what `Manifest.pipeline` says, `task` the name of the task whose requests it answers.
    """

    name: ClassVar[str]
    task: ClassVar[str]

    @classmethod
    @abstractmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> Self:
        """From the folder of the model's own files and `Manifest.config`. Raises BundleError when they do not fit."""

    @property
    @abstractmethod
    def origins(self) -> Mapping[str, str]:
        """What makes each input of the submodels, by the input's name: the file and its field, or another submodel. For
        messages.
        """

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """Requests to try a model with before it is built: together they use everything that can be wrong with the
        model's files.
        """

    def keep_within(self, room: Mapping[str, float]) -> Sequence[str]:
        """Make no call whose inputs take more bytes than there is room for, by submodel, where the algorithm can cut
        them. Returns sentences on what is done otherwise then.
        """
        return ()

    @abstractmethod
    def __call__(self, request: Any, /) -> Pipeline:
        """The generator that answers. Raises InvalidInput."""


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
    """Whatever maps a submodel's name to its engine."""

    def __getitem__(self, submodel: str, /) -> Engine: ...


def run_call(engines: Engines, call: Call) -> Outputs:
    """Execute one call on its engine."""
    engine = engines[call.submodel]
    if call.slot is not None and call.keep is not None:
        engine.trim(call.slot, call.keep)
    return engine.run(call.inputs, call.slot)


def drive(pipeline: Pipeline, engines: Engines) -> Generator[Event, None, None]:
    """Run a pipeline alone: execute its calls, pass on its events. Closing this generator closes the pipeline."""
    outputs: Outputs | None = None
    try:
        while True:
            item = pipeline.send(outputs)
            outputs = None
            if isinstance(item, Call):
                outputs = run_call(engines, item)
            else:
                yield item
    except StopIteration:
        return
    finally:
        pipeline.close()
