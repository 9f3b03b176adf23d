"""Runs a model once before it is ready, so that its first request takes no longer than the others."""

from __future__ import annotations

import logging
from time import perf_counter

from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput
from runtime.pipeline import ModelPipeline, drive
from serving.host.job import Model
from serving.host.loading import Loader

log = logging.getLogger(__name__)


def warmed(load: Loader) -> Loader:
    """A loader that also runs the examples of a model's pipeline. Their errors are errors of loading."""

    def load_and_run(bundle: Bundle, target: str | None) -> Model:
        model = load(bundle, target)
        try:
            warm_up(model)
        except BaseException:
            model.close()
            raise
        return model

    return load_and_run


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
