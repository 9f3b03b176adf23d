"""Runs a model once before it is ready, so that its first request takes no longer than the others."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from time import perf_counter

from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput
from runtime.pipeline import ModelPipeline, drive
from runtime.placing.loading import LoadedModel
from runtime.placing.placement import Place
from serving.host.job import Model
from serving.host.loading import Loader

log = logging.getLogger(__name__)


def warmed(load: Loader) -> Loader:
    """A loader that also runs the examples of a model's pipeline, and again where the model is loaded elsewhere. Their
    errors are errors of loading.
    """

    def load_and_run(bundle: Bundle, target: str | None) -> Model:
        model = load(bundle, target)
        _warm_or_close(model)
        return _warmed_elsewhere(model) if isinstance(model, LoadedModel) else model

    return load_and_run


def _warmed_elsewhere(model: LoadedModel) -> LoadedModel:
    """The model, which is warmed up as well when it is loaded elsewhere."""
    again = model.again

    def load_and_run(broken: Collection[Place]) -> LoadedModel:
        assert again is not None, "a model that was loaded can be loaded again"
        other = again(broken)
        _warm_or_close(other)
        return _warmed_elsewhere(other)

    return replace(model, again=load_and_run)


def _warm_or_close(model: Model) -> None:
    try:
        warm_up(model)
    except BaseException:
        model.close()
        raise


def warm_up(model: Model) -> None:
    """Run the examples of a model's pipeline. Raises the errors of its engines."""
    if not isinstance(model.pipeline, ModelPipeline):
        return
    began = perf_counter()
    for example in model.pipeline.examples():
        try:
            for _ in drive(model.pipeline(example.request), model.engines):
                pass
        except InvalidInput:
            if not example.optional:
                raise
    model.pipeline.prepare()
    log.info("warming up took %.1f s", perf_counter() - began)
