"""What is measured of a loaded model: one probe a metric, each run of which is one repetition.

Of every model the seconds a call of each submodel takes; what is measured besides depends on the task
(`profiles/tasks/`).

Pipelines are generators, so a submodel's inputs are found by running the pipeline against zeros: a call is measured at
the sizes, and with the guidance, that a request really gives it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from profiles.task import profile_tasks
from runtime.bundle.manifest import Frozen, Submodel
from runtime.bundle.signature import Array, Signature
from runtime.engine import Engine
from runtime.pipeline import Call, Outputs, Pipeline, answer
from runtime.placing.loading import LoadedModel


class ProbeSettings(Frozen):
    """What to ask of the model. Sizes in pixels, None is the model's default."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    prompt_tokens: int = Field(default=512, ge=1)
    new_tokens: int = Field(default=64, ge=2)


@dataclass(frozen=True)
class Probe:
    """One metric: `run` measures it once. `nbytes` is what must be read from memory for one unit, where that bounds a
    rate.
    """

    metric: str
    unit: str
    run: Callable[[], float]
    settings: Mapping[str, int | float | str] = field(default_factory=dict)
    nbytes: float | None = None


def probes(model: LoadedModel, settings: ProbeSettings) -> list[Probe]:
    """Everything that can be measured of this model. Raises InvalidInput when the model refuses the settings."""
    task = profile_tasks()[model.task]
    return _submodel_probes(model, task.request(settings)) + task.probes(model, settings)


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
    } | signature.bind(inputs)
    return {tensor.name: np.zeros(tensor.shape(lengths), tensor.dtype) for tensor in signature.outputs}


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _submodel_probes(model: LoadedModel, request: Any) -> list[Probe]:
    """The latency of every submodel without states; one that the request does not need runs on a sample of its usual
    size.
    """
    submodels = {submodel.name: submodel for submodel in model.bundle.manifest.submodels}
    calls = planned_calls(model.pipeline(request), submodels)
    found = []
    for name, submodel in submodels.items():
        if submodel.signature.states:
            continue
        usual = {dim.name: dim.opt for dim in submodel.signature.dims.values()} | {"batch": 1}
        inputs = calls[name].inputs if name in calls else submodel.signature.sample(usual)
        shapes: dict[str, int | float | str] = {
            tensor: "x".join(map(str, array.shape)) for tensor, array in inputs.items()
        }
        found.append(Probe(name, "s", _latency(model.engines[name], inputs), shapes))
    return found


def _latency(engine: Engine, inputs: Mapping[str, Array]) -> Callable[[], float]:
    return lambda: seconds(lambda: engine.run(inputs))
