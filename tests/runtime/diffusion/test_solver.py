"""A solver that only this folder has is found, listed among the samplers and draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import runtime.diffusion.solvers
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.published import SchedulerConfig
from runtime.diffusion.solver import Walk, make_sampler, samplers, solvers
from runtime.errors import InvalidInput
from runtime.pipeline import Progress, drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.tasks.image import ImageReady, ImageRequest
from tests.runtime.pipelines.test_diffusion import CONFIG as BUNDLE
from tests.runtime.pipelines.test_diffusion import SAMPLE, fakes

TOYS = Path(__file__).parent / "toys"
SHAPE = (1, 4, 2, 2)
CONFIG = SchedulerConfig.parse({"_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"})


@pytest.fixture
def heun(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the sampler in the folder of toys."""
    path = [*runtime.diffusion.solvers.__path__, str(TOYS)]
    monkeypatch.setattr(runtime.diffusion.solvers, "__path__", path)
    solvers.cache_clear()
    yield "toy_heun"
    solvers.cache_clear()


def test_a_file_is_all_a_solver_needs(heun: str) -> None:
    assert heun in samplers() and f"{heun}_karras" not in samplers()
    with pytest.raises(InvalidInput, match=f"did you mean '{heun}'"):
        make_sampler("toy_hein", CONFIG, 5)
    with pytest.raises(InvalidInput, match="only ddim and tcd have it"):
        make_sampler(heun, CONFIG, 5, eta=0.5)


def test_a_spacing_that_a_solver_has_not_is_refused(heun: str) -> None:
    for name, advice in (
        (f"{heun}_karras", f"use {heun} as it is"),
        ("euler_lu", "use euler with _karras, _exponential, _beta"),
        ("euler_karas", "did you mean 'euler"),
    ):
        with pytest.raises(InvalidInput, match=advice):
            make_sampler(name, CONFIG, 5)


def test_several_evaluations_make_one_step(heun: str) -> None:
    """It evaluates the model twice in every step but the last, and steps are counted once."""
    clean = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    walk = Walk(make_sampler(heun, CONFIG, 5), np.ones(SHAPE, np.float32), lambda: clean)
    steps = []
    while walk.latents is None:
        walk.advance(clean)
        steps.append(walk.step)
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    np.testing.assert_allclose(walk.latents, clean, atol=1e-5)


def test_it_draws(heun: str) -> None:
    """A request names it, and a bundle may have it as its default; progress counts steps, not evaluations."""
    config = DiffusionConfig.parse(BUNDLE | {"defaults": {"steps": 4, "guidance_scale": 3.0, "sampler": heun}})
    pipeline, engines = DiffusionPipeline(config, SAMPLE / "tokenizer"), fakes()
    events = list(drive(pipeline(ImageRequest("a red circle", preview_every=3, seed=1)), engines))
    progress = [event for event in events if isinstance(event, Progress)]
    assert [(event.step, event.total) for event in progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [event.step for event in progress if event.preview is not None] == [3]
    assert isinstance(events[-1], ImageReady) and len(engines["unet"].calls) == 7


def test_without_its_file_it_is_unknown() -> None:
    with pytest.raises(InvalidInput, match="is not known"):
        make_sampler("toy_heun", CONFIG, 5)
