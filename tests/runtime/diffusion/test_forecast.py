"""Which steps keep the denoiser, and what stands for its output in the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.diffusion.forecast import Forecast, Plan, Stored
from runtime.diffusion.published import SchedulerConfig
from runtime.diffusion.solver import Sampler, Walk, make_sampler, solvers
from runtime.errors import InvalidInput

CONFIG = SchedulerConfig.model_validate(
    {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True, "clip_sample": False}
)
X = np.random.default_rng(0).standard_normal((1, 2, 3, 3)).astype(np.float32)
TWICE = ("heun", "kdpm2", "kdpm2_ancestral", "dpmpp_sde")
"""Samplers that evaluate the model twice in a step; pndm does so in its first step alone."""


def sampler(name: str = "ddim", steps: int = 12, **options: Any) -> Sampler:
    return make_sampler(name, CONFIG, steps, **options)


def kept(text: str, steps: int = 12) -> list[int]:
    """The steps with the denoiser, from 1."""
    left_out = Plan.read(text, "ddim", sampler(steps=steps)).left_out
    return [step + 1 for step in range(steps) if step not in left_out]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("none", [*range(1, 13)]),
        ("every 1 after 1", [*range(1, 13)]),
        ("every 3 after 2", [1, 2, 5, 8, 11, 12]),
        ("every 2 after 4", [1, 2, 3, 4, 6, 8, 10, 12]),
        ("every 99 after 1", [1, 12]),
        ("every 5 after 99", [*range(1, 13)]),
        ("1-3,6, 9,12", [1, 2, 3, 6, 9, 12]),
        ("1", [1]),
        ("5,1", [1, 5]),
    ],
)
def test_a_text_says_which_steps_have_the_denoiser(text: str, steps: list[int]) -> None:
    assert kept(text) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is '', expected \"none\""),
        ("often", "is 'often', expected \"none\""),
        ("every 3", 'expected "none"'),
        ("every 0 after 1", "expected numbers of at least 1"),
        ("every 2 after 0", "the first step has the denoiser"),
        ("1-3,13", "names step 13, expected 1 to 12"),
        ("0,1", "names step 0, expected 1 to 12"),
        ("2-12", "leaves out step 1: nothing comes before it"),
        ("3-1", "leaves out step 1"),
        ("1,", 'expected "none"'),
        ("1," * 600, "has 1,200 characters, expected at most 1,000"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        kept(text)
    assert caught.value.field == "forecast" and message in str(caught.value)


@pytest.mark.parametrize("name", solvers())
def test_a_step_that_is_evaluated_twice_is_not_left_out(name: str) -> None:
    made = sampler(name)
    if name in TWICE:
        with pytest.raises(
            InvalidInput, match=f"^forecast: leaves out step 3, in which {name} evaluates .* more than once: use"
        ):
            Plan.read("every 3 after 2", name, made)
        assert not Plan.read("none", name, made).left_out
    else:
        assert Plan.read("every 3 after 2", name, made).left_out


def test_image_to_image_counts_the_steps_that_it_takes() -> None:
    plan = Plan.read("1,2,4", "ddim", sampler().strengthened(0.5))
    assert (plan.steps, sorted(plan.left_out)) == (6, [2, 4, 5])


def drawn(plan: Plan, made: Sampler, clean_at: Any, rows: int = 1) -> tuple[Any, list[Any]]:
    """The result of a walk with a model that finds these clean latents, and what was forecast of them."""
    walk, forecast, found = Walk(made, X, lambda: X), Forecast(plan), []
    while walk.latents is None:
        output = forecast.output(walk, rows)
        if output is None:
            output = np.concatenate([walk.output(clean_at(walk.point, row)) for row in range(rows)])
            forecast.add(walk, output)
        else:
            found.append((walk.clean(output), walk.point))
        walk.advance(output[-1:])
    assert forecast.left_out == len(found)
    return walk.latents, found


def line(point: Any, row: int) -> Any:
    return np.float32(0.7 + 0.05 * point.log_snr) * X * np.float32(1 + row)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "unipc", "pndm"])
def test_half_the_slope_of_the_last_two_outputs_is_followed(name: str, prediction: str) -> None:
    """Of each row its own; the line is over the log of signal over noise."""
    config = SchedulerConfig.model_validate(
        {"_class_name": "DDIMScheduler", "prediction_type": prediction, "skip_prk_steps": True, "clip_sample": False}
    )
    made = make_sampler(name, config, 12)
    _, found = drawn(Plan.read("every 3 after 2", name, made), made, line, rows=2)
    assert [point.step + 1 for _, point in found] == [3, 4, 6, 7, 9, 10]
    for clean, point in found:
        last = made.schedule.point({2: 1, 3: 1, 5: 4, 6: 4, 8: 7, 9: 7}[point.step])
        expected = [(line(point, row) + line(last, row)) / 2 for row in range(2)]
        np.testing.assert_allclose(clean, np.concatenate(expected), atol=2e-3)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "unipc", "pndm"])
def test_clean_latents_that_stay_the_same_are_forecast_exactly(name: str) -> None:
    made = sampler(name)
    whole, none = drawn(Plan.read("none", name, made), made, lambda point, row: X)
    less, found = drawn(Plan.read("every 3 after 2", name, made), made, lambda point, row: X)
    assert not none and len(found) == 6
    np.testing.assert_allclose(less, whole, atol=1e-4)


def test_after_one_output_it_is_held() -> None:
    made = sampler()
    _, found = drawn(Plan.read("1", "ddim", made), made, line)
    first = line(made.schedule.point(0), 0)
    assert len(found) == 11
    for clean, _ in found:
        np.testing.assert_allclose(clean, first, atol=2e-3)


def test_a_row_that_was_never_computed_is_not_forecast() -> None:
    made = sampler()
    walk, forecast = Walk(made, X, lambda: X), Forecast(Plan.read("1", "ddim", made))
    forecast.add(walk, X)
    walk.advance(X)
    assert forecast.output(walk, 2) is None and forecast.output(walk, 1) is not None


def test_a_schedule_may_begin_without_signal() -> None:
    """The first point of such a schedule (rescale_betas_zero_snr) is far from all others."""
    config = SchedulerConfig.model_validate(
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "clip_sample": False, "timestep_spacing": "trailing"}
    )  # fmt: skip
    made = make_sampler("ddim", config, 8)
    assert made.schedule.point(0).log_snr < -10
    result, found = drawn(Plan.read("every 3 after 1", "ddim", made), made, lambda point, row: X)
    assert np.isfinite(result).all() and len(found) == 4


def test_what_is_stored_is_of_a_sampler_and_a_number_of_steps() -> None:
    stored = Stored(forecast="every 3 after 2", sampler="ddim", steps=20)
    stored.check("ddim", 20)
    for name, steps in (("euler", 20), ("ddim", 19)):
        with pytest.raises(InvalidInput, match=f"stored is of 20 steps of ddim, and these are {steps} of {name}"):
            stored.check(name, steps)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_an_output_is_found_again_from_its_clean_latents(name: str) -> None:
    made, x = sampler(name), np.random.default_rng(1).standard_normal((1, 2, 3, 3)).astype(np.float32)
    walk = Walk(made, x, lambda: x)
    rows = np.concatenate([2 * x, 3 * x])
    np.testing.assert_allclose(walk.output(walk.clean(rows)), rows, rtol=1e-3)
