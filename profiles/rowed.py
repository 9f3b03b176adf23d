"""Times calls of submodels with more and fewer rows: `python -m profiles.rowed JOB`, a worker as `profiles.worker` is.

From these times a server knows how many calls of several requests to make as one (`serving.host.joining`). Long calls
are left out: a server does not join them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from profiles.probes import Probe, planned_calls, seconds, shapes
from profiles.task import profile_tasks
from profiles.worker import work
from runtime.engine import Engine
from runtime.errors import EngineError
from runtime.placing.loading import LoadedModel
from runtime.stacking import Inputs, Rows
from serving.host.joining import LONG

COUNTS: Final = (1, 2, 4, 8)
"""Calls that are made as one."""


def rowed_probes(model: LoadedModel, options: Mapping[str, Any]) -> list[Probe]:
    """A probe for each number of calls of each submodel that a server might join, as a variant such as "x4"."""
    task = profile_tasks()[model.task]
    request = task.request(model, task.settings.model_validate(dict(options)))
    submodels = {submodel.name: submodel for submodel in model.bundle.manifest.submodels}
    found = []
    for name, call in planned_calls(model.pipeline(request), submodels).items():
        engine, rows = model.engines[name], Rows.of(submodels[name].signature)
        if rows is None or call.slot is not None or not engine.joins(call.inputs) or _slow(engine, call.inputs):
            continue
        for count in (one for one in COUNTS if one * rows.count(call.inputs) <= rows.most):
            inputs = rows.stack([call.inputs] * count)
            if count > 1 and not _takes(engine, inputs):
                break
            probe = partial(seconds, partial(engine.run, inputs))
            found.append(Probe(name, "s", probe, shapes(inputs), variant=f"x{count}"))
    return found


def _slow(engine: Engine, inputs: Inputs) -> bool:
    engine.run(inputs)  # an engine may prepare for a shape at first
    return seconds(lambda: engine.run(inputs)) > LONG


def _takes(engine: Engine, inputs: Inputs) -> bool:
    """Whether the engine can run this: some are compiled for fewer rows than the signature has."""
    try:
        engine.run(inputs)
    except EngineError:
        return False
    return True


if __name__ == "__main__":
    work(lambda model, job: rowed_probes(model, job.settings))
