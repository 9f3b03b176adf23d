"""A solver that only this folder has is found, listed among the samplers and draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import runtime.diffusion.solvers
from runtime.diffusion.published import SchedulerConfig
from runtime.diffusion.solver import Walk, make_sampler, samplers, solvers
from runtime.errors import InvalidInput

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
    with pytest.raises(InvalidInput, match="only the sampler ddim has it"):
        make_sampler(heun, CONFIG, 5, eta=0.5)


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


def test_without_its_file_it_is_unknown() -> None:
    with pytest.raises(InvalidInput, match="is not known"):
        make_sampler("toy_heun", CONFIG, 5)
