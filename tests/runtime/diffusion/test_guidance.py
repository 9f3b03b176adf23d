"""Classifier-free guidance: which rows there are, and how their predictions become one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from runtime.diffusion.guidance import Guidance, embedding


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_up_to_one_there_is_only_the_prompt(scale: float) -> None:
    x = np.ones((1, 4, 2, 2), np.float32)
    guidance = Guidance(scale)
    assert (guidance.guided, guidance.rows) == (False, 1) and guidance.batch(x).shape == x.shape
    assert guidance.combine(x) is x


def test_above_one_the_prediction_is_pushed_away_from_the_negative_prompts() -> None:
    guidance = Guidance(3.0)
    assert guidance.guided and guidance.batch(np.ones((1, 4, 2, 2), np.float32)).shape == (2, 4, 2, 2)
    output = np.array([[1.0], [2.0]], np.float32)
    combined = guidance.combine(output)
    assert combined.tolist() == [[4.0]] and combined.dtype == np.float32


@pytest.mark.parametrize(
    ("start", "end", "steps", "guided"),
    [
        (0.0, 1.0, 5, [0, 1, 2, 3, 4]),
        (0.2, 0.8, 10, [2, 3, 4, 5, 6, 7]),
        (0.25, 0.75, 3, [0, 1]),
        (0.0, 0.3, 3, []),
    ],
)
def test_an_interval_guides_a_part_of_the_steps(start: float, end: float, steps: int, guided: list[int]) -> None:
    """The same steps as ClassifierFreeGuidance of diffusers."""
    guidance = Guidance(3.0, start=start, end=end)
    assert [step for step in range(steps) if guidance.at(step, steps).guided] == guided
    guiders = pytest.importorskip("diffusers.guiders")
    with warnings.catch_warnings(action="ignore"):
        library = guiders.ClassifierFreeGuidance(3.0, start=start, stop=end)
    for step in range(steps):
        library.set_state(step, steps, step)
        assert library._is_cfg_enabled() == (step in guided), step


def test_without_guidance_the_last_row_is_left() -> None:
    conditions = {"states": np.arange(6, dtype=np.float32).reshape(2, 3)}
    guidance = Guidance(3.0, end=0.5)
    assert guidance.at(0, 4).of_rows(conditions)["states"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert guidance.at(2, 4).of_rows(conditions)["states"].tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.5])
def test_a_distilled_model_receives_the_scale_and_is_not_guided(scale: float) -> None:
    guidance = Guidance(scale, width=8)
    assert (guidance.guided, guidance.rows) == (False, 1)
    (condition,) = guidance.conditions.values()
    assert condition.shape == (1, 8) and condition.dtype == np.float32 and Guidance(scale).conditions == {}


@pytest.mark.parametrize("width", [4, 9, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_the_embedding_is_that_of_diffusers(width: int, scale: float) -> None:
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    made = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor(scale - 1).repeat(1), embedding_dim=width
    )
    np.testing.assert_allclose(embedding(scale - 1, width), made.numpy(), atol=1e-3)  # of angles up to 7500
