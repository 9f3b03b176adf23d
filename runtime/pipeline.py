"""What a pipeline is: a generator that yields engine calls and events, and is sent each call's outputs.

    def pipeline() -> Pipeline:
        hidden = yield Call("text_encoder", {"input_ids": ids})
        yield Progress(step=1, total=20)

It never touches an engine. `drive` runs the calls of one pipeline, `tap` looks at them on their way; a server may
gather the calls of many into batches.
Closing the generator cancels the work at the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from runtime.bundle.signature import Array
from runtime.engine import Engine, Slot

Outputs = dict[str, Array]


@dataclass(frozen=True)
class Call:
    """Run a submodel on these inputs. `slot` names the states to use; `keep` forgets those beyond that many positions
    first. A new slot may continue from what another holds, its `origin`. Of a decoder, outputs are those of the `last`
    so many new positions.
    """

    submodel: str
    inputs: Mapping[str, Array]
    slot: Slot | None = None
    keep: int | None = None
    origin: Slot | None = None
    last: int = 1


class Event:
    """Something the pipeline tells its caller: base of `Progress`, `ImageReady`, `TextDelta`, `Finished`."""


@dataclass(frozen=True)
class Progress(Event):
    """`step` of `total` is done. `preview` is a uint8 RGB picture [height, width, 3] when asked for."""

    step: int
    total: int
    preview: Array | None = None


@dataclass(frozen=True)
class ImageReady(Event):
    """One finished picture: uint8 RGB [height, width, 3], the `index`th of the job, drawn with `seed`."""

    image: Array
    index: int
    seed: int


@dataclass(frozen=True)
class TextDelta(Event):
    """Newly decoded text: whole characters only."""

    text: str


@dataclass(frozen=True)
class Finished(Event):
    """The answer is complete. `reason` is "stop" (end token or stop string) or "length" (max tokens)."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


Pipeline = Generator[Call | Event, Outputs | None, None]


@dataclass(frozen=True)
class Example:
    """A small request that a pipeline's model should answer. `what` names what is special about it, as in "a picture".

    A model that refuses an `optional` one can be used all the same.
    """

    what: str
    request: Any
    optional: bool = False


class ModelPipeline(Protocol):
    """What answers the requests of one model. It is made from the folder that holds the model's own files, and
    `Manifest.config`.
    """

    @property
    def origins(self) -> Mapping[str, str]:
        """What makes each input of the submodels, by the input's name: the file and its field, or another submodel. For
        messages.
        """

    def examples(self) -> Iterator[Example]:
        """Requests to try a model with before it is built: together they use everything that can be wrong with the
        model's files.
        """

    def __call__(self, request: Any, /) -> Pipeline:
        """The generator that answers. Raises InvalidInput."""


class Engines(Protocol):
    """Whatever maps a submodel's name to its engine."""

    def __getitem__(self, submodel: str, /) -> Engine: ...


def run_call(engines: Engines, call: Call) -> Outputs:
    """Execute one call on its engine."""
    engine = engines[call.submodel]
    if call.slot is not None and call.origin is not None:
        engine.copy(call.origin, call.slot)
    if call.slot is not None and call.keep is not None:
        engine.trim(call.slot, call.keep)
    if call.last > 1:
        return engine.run_last(call.inputs, call.slot or Slot(), call.last)
    return engine.run(call.inputs, call.slot)


def drive(pipeline: Pipeline, engines: Engines) -> Generator[Event, None, None]:
    """Run a pipeline alone: execute its calls, pass on its events. Closing this generator closes the pipeline."""
    return answer(pipeline, partial(run_call, engines))


def answer(pipeline: Pipeline, execute: Callable[[Call], Outputs]) -> Generator[Event, None, None]:
    """`drive` with any function in place of engines: it gives each call's outputs."""
    outputs: Outputs | None = None
    with closing(pipeline), suppress(StopIteration):
        while True:
            item = pipeline.send(outputs)
            outputs = None
            if isinstance(item, Call):
                outputs = execute(item)
            else:
                yield item


def tap(pipeline: Pipeline, seen: Callable[[Call, Outputs], Outputs]) -> Pipeline:
    """The same pipeline, for any driver: `seen` gets every call with its outputs, and gives what the pipeline gets."""
    outputs: Outputs | None = None
    with closing(pipeline), suppress(StopIteration):
        while True:
            item = pipeline.send(outputs)
            outputs = yield item
            if isinstance(item, Call):
                assert outputs is not None, "a driver answers a call with its outputs"
                outputs = seen(item, outputs)
