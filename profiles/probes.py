"""What is measured of a loaded model: a probe for each metric, whose every run is one repetition.

Of every model, the seconds of a call of each submodel; the rest depends on the task (`profiles/tasks/`).

Pipelines are generators, so a submodel's inputs are found by running the pipeline with outputs of zeros: a call is
measured at the sizes, and with the guidance, of a real request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from profiles.roofline.work import operations
from profiles.task import ProfileTask, profile_tasks
from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import Array, Signature
from runtime.engine import Engine
from runtime.pipeline import Call, Outputs, Pipeline, answer
from runtime.placing.loading import LoadedModel


@dataclass(frozen=True)
class Probe:
    """One metric: `run` measures it once. `nbytes` are the bytes read from memory for one unit, where they limit a
    rate. `variant` tells probes of one metric apart.
    """

    metric: str
    unit: str
    run: Callable[[], float]
    settings: Mapping[str, int | float | str] = field(default_factory=dict)
    nbytes: float | None = None
    variant: str = ""

    @property
    def key(self) -> str:
        """What a worker calls it."""
        return f"{self.metric} {self.variant}".strip()


GIGA: Final = 1e9
OPERATIONS: Final = "Gop"
"""The unit of counted operations: billions."""
BATCHED: Final = "batched"
"""The metric of several requests that run together."""


def probes(model: LoadedModel, options: Mapping[str, Any], batches: Sequence[int] = ()) -> list[Probe]:
    """Everything that can be measured of this model, with so many requests together besides. `options` are fields of
    its task's settings. Raises InvalidInput when the model refuses them.
    """
    task = profile_tasks()[model.task]
    settings = task.settings.model_validate(dict(options))
    found = _submodel_probes(model, task.request(model, settings)) + task.probes(model, settings)
    return found + [_batched(model, task, settings, count) for count in batches if task.batched]


def _batched(model: LoadedModel, task: ProfileTask, settings: Any, count: int) -> Probe:
    assert task.batched is not None
    rate = task.batched(model, settings, count)
    return Probe(BATCHED, rate.unit, rate.run, {"batch": count, **rate.settings}, variant=str(count))


def planned_calls(pipeline: Pipeline, submodels: Mapping[str, Submodel]) -> dict[str, Call]:
    """The first call of every submodel that a pipeline makes, found without any engine: each call is answered with
    zeros.
    """
    found: dict[str, Call] = {}

    def zeros(call: Call) -> Outputs:
        found.setdefault(call.submodel, call)
        return _zeros(submodels[call.submodel].signature, call.inputs)

    for _ in answer(pipeline, zeros):
        pass
    return found


def _zeros(signature: Signature, inputs: Mapping[str, Array]) -> Outputs:
    lengths = {
        dim.name: dim.opt for tensor in signature.outputs for dim in tensor.dims if not isinstance(dim, int)
    } | signature.complete(signature.bind(inputs))
    return {tensor.name: np.zeros(tensor.shape(lengths), tensor.dtype) for tensor in signature.outputs}


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def counts(model: LoadedModel, options: Mapping[str, Any]) -> list[Probe]:
    """Operations of the same call of every submodel without states, in billions."""
    task = profile_tasks()[model.task]
    request = task.request(model, task.settings.model_validate(dict(options)))

    def count(submodel: Submodel, inputs: Mapping[str, Array]) -> Callable[[], float]:
        return lambda: operations(model.bundle.root / submodel.graph, inputs) / GIGA

    return [
        Probe(submodel.name, OPERATIONS, count(submodel, inputs), shapes(inputs))
        for submodel, inputs in _calls(model, request)
    ]


def _submodel_probes(model: LoadedModel, request: Any) -> list[Probe]:
    """The latency of every submodel without states."""
    return [
        Probe(submodel.name, "s", _latency(model.engines[submodel.name], inputs), shapes(inputs))
        for submodel, inputs in _calls(model, request)
    ]


def _calls(model: LoadedModel, request: Any) -> Iterator[tuple[Submodel, Mapping[str, Array]]]:
    """Every submodel without states with a call of it; one that the request does not need gets a sample of its usual
    size.
    """
    submodels = {submodel.name: submodel for submodel in model.bundle.manifest.submodels}
    calls = planned_calls(model.pipeline(request), submodels)
    for name, submodel in submodels.items():
        if submodel.signature.states:
            continue
        usual = {dim.name: dim.opt for dim in submodel.signature.dims.values()} | {"batch": 1}
        yield submodel, calls[name].inputs if name in calls else submodel.signature.sample(usual)


def shapes(inputs: Mapping[str, Array]) -> dict[str, int | float | str]:
    """The shapes of a call's inputs, as the settings of a row."""
    return {name: "x".join(map(str, array.shape)) for name, array in inputs.items()}


def _latency(engine: Engine, inputs: Mapping[str, Array]) -> Callable[[], float]:
    return lambda: seconds(lambda: engine.run(inputs))
