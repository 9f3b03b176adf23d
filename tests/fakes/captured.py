"""Inputs of submodels for tests: captured on the built-in requests."""

from __future__ import annotations

from calibration.capture.data import SAMPLES, record
from calibration.capture.sets import Samples
from calibration.requests.requests import built_in
from runtime.placing.loading import LoadedModel


def captured(model: LoadedModel, limit: int = SAMPLES) -> Samples:
    """The inputs of each submodel on the built-in requests of a float model, at most `limit` calls of each."""
    requests = built_in(model.task, 0, model.bundle.manifest.source.fingerprint)
    return record(model, requests, limit=limit).samples
