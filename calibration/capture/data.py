"""The capture of what submodels get while a model works: the inputs that it is calibrated with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from calibration.capture.recording import Inputs, Quota, Recorder, count_positions
from calibration.capture.sets import CalibrationSet
from calibration.ground.progress import each, followed
from calibration.ground.progress import reused as mark_reused
from calibration.requests.requests import NamedRequest, Requests, accepted
from calibration.requests.task import Beside, task_requests
from runtime.errors import InvalidInput, NotFound, SourceError
from runtime.pipeline import Call, Pipeline, drive
from runtime.placing.loading import LoadedModel

SAMPLES: Final = 24
"""Calls kept of each submodel, at least where so many are seen."""
PER_REQUEST: Final = 3
"""Calls kept of each submodel for a request, where that is more."""


@dataclass(frozen=True)
class Done:
    """A request begins (`seconds` None) or is done; `reused` if an earlier capture had done it. `number`
    counts from 1.
    """

    number: int
    total: int
    name: str
    seconds: float | None = None
    reused: bool = False


def record(
    model: LoadedModel,
    requests: Requests,
    count: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
    listen: Callable[[Done], None] = lambda done: None,
) -> CalibrationSet:
    """Run a float model on `count` requests; the inputs that its submodels got, at most `limit` calls of each (None: by
    the requests).

    Equal arguments give equal sets. Calls that no pipeline makes are the task's (`TaskRequests.beside`). In `folder`
    each finished request is kept; a later call with the same model, requests and arguments goes on from there. Raises
    InvalidInput when no request can be used; EngineError.
    """
    manifest = model.bundle.manifest
    wanted = requests.wanted(count)
    quota = Quota(max(SAMPLES, PER_REQUEST * wanted) if limit is None else limit, wanted, seed)
    samples: dict[str, list[Inputs]] = {submodel.name: [] for submodel in manifest.submodels}
    positions: dict[str, list[int]] = {submodel: [] for submodel in samples}
    used = 0
    for entry, work in each("request", accepted(lambda entry: _prepared(model, entry), requests, wanted), wanted):
        done = Done(used + 1, wanted, entry.name)
        listen(done)
        start = time.perf_counter()
        file = folder / f"{used:04d}.safetensors" if folder else None
        key = _key(manifest.key, quota, used, entry)
        part = _kept(file, key) if file else None
        reused = part is not None
        if reused:
            mark_reused()
        if part is None:
            part = _run(model, work, entry, quota, used, key)
            if file:
                part.save(file)
        for submodel, calls in part.samples.items():
            samples[submodel] += [dict(call) for call in calls]
            positions[submodel] = _added(positions[submodel], part.settings["positions"][submodel])
        used += 1
        listen(dataclasses.replace(done, seconds=time.perf_counter() - start, reused=reused))
    settings = {
        "origin": requests.origin,
        "file": requests.file,
        "count": count,
        "limit": quota.limit,
        "seed": seed,
        "requests": used,
        "skipped": list(requests.skipped),
        "positions": positions,
    }
    return CalibrationSet(manifest.pipeline, manifest.source.fingerprint, settings, samples)


@dataclass(frozen=True)
class _Work:
    """What the model does for a request, and the calls that are recorded beside those that it makes."""

    pipeline: Pipeline
    calls: Sequence[Call]
    beside: Beside


def _prepared(model: LoadedModel, entry: NamedRequest) -> _Work:
    """Raises InvalidInput when the model cannot read the request."""
    task = task_requests()[model.task]
    calls, beside = task.beside(model.bundle.manifest.config, entry.picture, entry.name)
    request = task.fitted(model.bundle.manifest.config, entry.request)
    return _Work(model.pipeline(request), calls, beside)


def _run(model: LoadedModel, work: _Work, entry: NamedRequest, quota: Quota, number: int, key: str) -> CalibrationSet:
    """Run one request; what is kept of it. `number` counts from 0."""
    recorder = Recorder({submodel.name: submodel.signature for submodel in model.bundle.manifest.submodels})
    for call in work.calls:
        recorder.offer(call)
    for event in followed(
        drive(recorder.watch(work.pipeline), model.engines), getattr(entry.request, "max_tokens", None) or 0
    ):
        for call in work.beside(event):
            recorder.offer(call)
    samples, positions = {}, {}
    for submodel, calls in recorder.calls().items():
        kept = quota.positions(submodel, number, len(calls))
        samples[submodel] = [calls[place] for place in kept]
        positions[submodel] = count_positions(kept, len(calls))
    return CalibrationSet(model.bundle.manifest.pipeline, key, {"name": entry.name, "positions": positions}, samples)


def _kept(file: Path, key: str) -> CalibrationSet | None:
    """What an earlier capture kept of this very request."""
    try:
        found = CalibrationSet.load(file)
    except (NotFound, InvalidInput, SourceError):
        return None
    return found if found.fingerprint == key else None


def _key(model: str, quota: Quota, number: int, entry: NamedRequest) -> str:
    """Identifies everything that what is kept of a request depends on."""
    facts = (model, dataclasses.astuple(quota), number, _facts(entry))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _facts(value: Any) -> Any:
    """A request as JSON, pictures as their hashes."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if dataclasses.is_dataclass(value):
        return {field.name: _facts(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_facts(item) for item in value] if isinstance(value, list | tuple) else value


def _added(counts: list[int], more: list[int]) -> list[int]:
    """The sums of two lists of counts, the shorter one filled up with zeros."""
    length = max(len(counts), len(more))
    return [sum(pair) for pair in zip(*(one + [0] * (length - len(one)) for one in (counts, more)), strict=True)]
