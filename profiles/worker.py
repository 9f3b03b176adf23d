"""The worker that measures one bundle on one target: `python -m profiles.worker JOB`, which `profiles.bench` starts.

Its messages are described in `profiles.protocol`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from calibration.ground import machine
from profiles.probes import Probe, counts, probes
from profiles.protocol import Channel, Hello, Metric
from runtime.bundle.manifest import Frozen
from runtime.engine import Options
from runtime.placing.containers import allowance
from runtime.placing.loading import LoadedModel, load_model
from runtime.placing.placement import PlacementOptions


class Job(Frozen):
    """Which bundle to load, on which target, with how many threads (0 = all), and the settings of what is measured;
    with so many requests together besides. Other purposes than to `measure` are to `start`, which measures nothing but
    loading, and to `count` the operations of submodels, with the bundle's graphs.
    """

    bundle: Path
    target: str
    threads: int = 0
    settings: Mapping[str, JsonValue] = {}
    batches: tuple[int, ...] = ()
    purpose: Literal["measure", "start", "count"] = "measure"


def work(find: Callable[[LoadedModel, Job], list[Probe]]) -> None:
    """Load, then measure what is found of the model, until the input ends. Figures that were stored before decide
    nothing here: what is measured would depend on them.
    """
    channel = Channel()
    try:
        job = Job.model_validate_json(sys.argv[1])
        start = time.perf_counter()
        model = load_model(job.bundle, job.target, Options(threads=job.threads), PlacementOptions(rows=()))
        load = time.perf_counter() - start
        found = find(model, job)
    except Exception as error:  # the driver shows it
        channel.fail(error)
        sys.exit(1)
    channel.serve(hello(model, job, load, found), {probe.key: probe.run for probe in found})
    model.close()


def _probes(model: LoadedModel, job: Job) -> list[Probe]:
    if job.purpose == "measure":
        return probes(model, job.settings, job.batches)
    return counts(model, job.settings) if job.purpose == "count" else []


def hello(model: LoadedModel, job: Job, load: float, found: list[Probe]) -> Hello:
    """The first message: what this worker measures."""
    return Hello(
        program=machine.program(),
        target=model.target,
        device=model.device,
        threads=job.threads or allowance().threads,
        versions=machine.versions(),
        load=load,
        metrics={probe.key: metric(probe) for probe in found},
        quant=model.bundle.manifest.quant,
    )


def metric(probe: Probe) -> Metric:
    described = Metric(unit=probe.unit, settings=dict(probe.settings))
    if probe.variant:
        described["name"] = probe.metric
    if probe.nbytes is not None:
        described["bytes"] = probe.nbytes
    return described


if __name__ == "__main__":
    work(_probes)
