"""Every sampler against its diffusers counterpart, on the same noise and the same model outputs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.diffusion.published import SchedulerConfig
from runtime.diffusion.solver import Sampler, Walk, make_sampler, samplers, solvers
from runtime.diffusion.training import alphas_cumprod
from runtime.errors import InvalidInput
from tests.runtime.diffusion.reference import CLASSES, WITH_ETA, class_of, feed, reference, split

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array_.*:DeprecationWarning")  # torch tensors inside diffusers

SHAPE = (2, 4, 3, 5)
TOLERANCE = 1e-4
SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

configs = st.fixed_dictionaries(
    {},
    optional={
        "num_train_timesteps": st.sampled_from([1000, 400]),
        "beta_start": st.sampled_from([0.0001, 0.00085]),
        "beta_end": st.sampled_from([0.012, 0.02]),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "steps_offset": st.sampled_from([0, 1]),
        "rescale_betas_zero_snr": st.booleans(),
        "set_alpha_to_one": st.booleans(),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([1.0, 2.5]),
        "interpolation_type": st.sampled_from(["linear", "log_linear"]),
        "lower_order_final": st.booleans(),
        "euler_at_final": st.booleans(),
        "solver_order": st.sampled_from([1, 2, 3]),
        "solver_type": st.sampled_from(["midpoint", "heun", "bh1", "bh2", "logrho"]),
        "skip_prk_steps": st.booleans(),
        "variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large"]),
        "original_inference_steps": st.sampled_from([50, 100]),
        "timestep_scaling": st.sampled_from([10.0, 3.0]),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1, -2.0]),
        "trained_betas": st.sampled_from([1000, 400]).map(lambda count: np.linspace(0.001, 0.02, count).tolist()),
    },
)


def published(name: str, config: dict[str, Any]) -> SchedulerConfig:
    """A file of the class that the sampler equals, where it does not name one."""
    return SchedulerConfig.parse({"_class_name": class_of(name), **config})


def ready(name: str, config: dict[str, Any], steps: int) -> Any:
    """The diffusers scheduler of that name, on that config, its steps set."""
    scheduler = reference(name, config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a repeated first timestep makes it skip one
    return scheduler


def model(x: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth function of latents and time, of the size of a noise prediction."""
    return (np.tanh(x + 0.3) * np.float32(np.cos(timestep / 300)) + 0.1 * x[:, ::-1]).astype(np.float32)


def theirs(
    name: str, config: dict[str, Any], steps: int, noise: np.ndarray, eta: float, times: list[float]
) -> np.ndarray:
    """The latents that diffusers ends with. The model receives `times`, which may differ from diffusers' own where
    those are truncated: torch's square root is off by a last bit, and a whole timestep becomes the one before.
    """
    scheduler = ready(name, config, steps)
    truncated = split(name)[1] in ("exponential", "beta") and scheduler.timesteps.dtype == torch.int64
    np.testing.assert_allclose(times, scheduler.timesteps.numpy(), rtol=0, atol=1 if truncated else 2e-3)
    stream = iter(noise[1:])
    latents = torch.from_numpy(noise[0]) * scheduler.init_noise_sigma
    with pytest.MonkeyPatch.context() as patch:
        feed(name, lambda: torch.from_numpy(next(stream)), patch)
        for timestep, time in zip(scheduler.timesteps, times, strict=True):
            output = model(scheduler.scale_model_input(latents, timestep).numpy(), time)
            latents = scheduler.step(
                torch.from_numpy(output), timestep, latents, **({"eta": eta} if name in WITH_ETA else {})
            ).prev_sample.float()
    return np.asarray(latents.numpy())


def ours(
    name: str, config: dict[str, Any], steps: int, noise: np.ndarray, eta: float = 0.0
) -> tuple[np.ndarray, list[float]]:
    return walked(make_sampler(name, published(name, config), steps, eta), noise)


def walked(sampler: Sampler, noise: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The latents that a sampler ends with, from the first of the noises on, the others as its fresh noise; and the
    timesteps that the model received.
    """
    stream, times = iter(noise[1:]), []
    walk = Walk(sampler, noise[0], lambda: next(stream))
    while walk.latents is None:
        times.append(walk.time)
        walk.advance(model(walk.x, walk.time))
    assert walk.latents.dtype == np.float32
    return walk.latents, times


def noises(steps: int, seed: int) -> np.ndarray:
    """Starting noise, and as much fresh noise as any sampler draws."""
    return np.random.default_rng(seed).standard_normal((2 * steps + 1, *SHAPE), dtype=np.float32)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, relative to the larger of 1 and the reference's largest value."""
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


def theirs_is_sound(name: str, config: dict[str, Any], steps: int) -> bool:
    """Whether diffusers' timesteps all lie in the training, none comes twice, and noise never rises from step to step.

    It may rise at the start where `rescale_betas_zero_snr` puts 2**-24 behind a smaller value.
    """
    try:
        scheduler = ready(name, config, steps)
    except (IndexError, ValueError):
        return False
    timesteps = scheduler.timesteps.numpy()
    if split(name)[0] in SEVERAL:
        timesteps = np.unique(timesteps)[::-1]
        if len(timesteps) < steps:
            return False
    if hasattr(scheduler, "sigmas") and (np.diff(scheduler.sigmas.numpy()) > 0).any():
        return False
    last = config.get("num_train_timesteps", 1000) - 1
    return bool(timesteps.size and timesteps.max() <= last and timesteps.min() >= 0 and (np.diff(timesteps) < 0).all())


SEVERAL = {"heun", "kdpm2", "kdpm2_ancestral", "dpmpp_sde", "pndm"}
"""Solvers that evaluate the model more often than once in a step."""
NO_SAMPLE = {"euler_ancestral", "kdpm2", "kdpm2_ancestral", "dpmpp_sde", "pndm"}
"""Those whose class in diffusers does not take models that predict clean latents."""


def comparable(name: str, config: dict[str, Any], steps: int) -> bool:
    """Whether diffusers' own numbers can be compared with."""
    solver, spacing = split(name)
    total = config.get("num_train_timesteps", 1000)
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
    return not (
        (solver in NO_SAMPLE and config.get("prediction_type") == "sample")
        or len(config.get("trained_betas") or [0] * total) != total
        # torch's square root is off by a last bit, which decides rounded and cosine timesteps
        or (config.get("rescale_betas_zero_snr") and (spacing or cosine))
        # float32 latents of 20,000 times the signal, and derivatives that are differences of them
        or (cosine and solver in SEVERAL | {"lms"} - {"pndm"})
        # for some counts, such as 61 of 1000, diffusers takes a step too many
        or (config.get("timestep_spacing") == "trailing" and len(np.arange(total, 0, -total / steps)) != steps)
        # the middle of a step is a difference of float32 numbers close to each other
        or (solver == "kdpm2_ancestral" and (1 < steps < 5 or spacing == "beta"))
        # weights of third order are differences of float32 numbers: see the test in double precision below
        or (solver == "deis" and config.get("solver_order") == 3)
        # diffusers' last noise level is that of the first step there: nothing is denoised
        or (solver in ("deis", "unipc") and spacing and steps == 1)
    )


@pytest.mark.parametrize("solver", solvers())
@settings(max_examples=10)
@given(
    data=st.data(),
    config=configs,
    steps=st.integers(1, 60),
    eta=st.sampled_from([0.0, 0.3, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_equals_diffusers(
    solver: str, data: st.DataObject, config: dict[str, Any], steps: int, eta: float, seed: int
) -> None:
    """Timesteps, starting noise and result, over the whole space of supported configs."""
    spacing = data.draw(st.sampled_from(["", *solvers()[solver].spacings]))
    name = f"{solver}_{spacing}" if spacing else solver
    if class_of(name).startswith("DPMSolver"):
        config.pop("solver_order", None)  # the name says it
    assume(comparable(name, config, steps))
    eta = eta if name in WITH_ETA else 0.0
    try:
        sampler = make_sampler(name, published(name, config), steps, eta)
    except InvalidInput as error:
        assert error.field in ("steps", "sampler")
        assert not theirs_is_sound(name, config, steps) or error.field != "steps", str(error)
        assume(False)
    scheduler = ready(name, config, steps)
    # A last bit of float32 in a value near 1 is a larger share of what is left to 1.
    rel = 2e-4 if config.get("rescale_betas_zero_snr") else 1e-5
    assert sampler.schedule.start == pytest.approx(float(scheduler.init_noise_sigma), rel=rel)
    noise = noises(steps, seed)
    found, times = walked(sampler, noise)
    try:
        expected = theirs(name, config, steps, noise, eta, times)
    except RuntimeError:  # UniPC's equations are singular there
        assume(False)
    assume(bool(np.isfinite(expected).all()))
    # diffusers subtracts float32 numbers as large as the starting noise, which with a cosine schedule is 20,000 times
    # the signal
    loudest = float(scheduler.sigmas.max()) if hasattr(scheduler, "sigmas") else 1.0
    assert difference(found, expected) <= TOLERANCE + 1e-6 * loudest


@pytest.mark.parametrize("name", ["deis", "deis_karras", "deis_beta"])
def test_third_order_deis_equals_diffusers_in_double_precision(name: str) -> None:
    """In float32 diffusers itself is up to 2e-3 off, where steps are short."""
    for steps in (2, 13, 25, 60):
        config, noise = {"solver_order": 3}, noises(steps, steps)
        found, times = ours(name, config, steps, noise)
        scheduler = ready(name, config, steps)
        scheduler.sigmas = scheduler.sigmas.double()
        latents = torch.from_numpy(noise[0]).double()
        for timestep, time in zip(scheduler.timesteps, times, strict=True):
            output = torch.from_numpy(model(latents.numpy().astype(np.float32), time)).double()
            latents = scheduler.step(output, timestep, latents).prev_sample
        assert difference(found, latents.numpy()) <= 1e-5


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_equals_diffusers_and_ends_at_no_noise_too(order: int, steps: int) -> None:
    """A last step to no noise is NaN in diffusers, infinite B(h) times zero."""
    config, noise = {"solver_type": "bh1", "solver_order": order, "final_sigmas_type": "sigma_min"}, noises(steps, 0)
    found, times = ours("unipc", config, steps, noise)
    assert difference(found, theirs("unipc", config, steps, noise, 0.0, times)) <= TOLERANCE
    assert np.isfinite(ours("unipc", config | {"final_sigmas_type": "zero"}, steps, noise)[0]).all()


@pytest.mark.parametrize("name", samplers())
def test_stable_diffusion_config_at_usual_steps(name: str) -> None:
    """Stable Diffusion 1.5's own file, and the worst difference printed."""
    worst = 0.0
    for steps in (1, 5, 8, 20, 30):
        if comparable(name, SD15, steps):
            noise = noises(steps, steps)
            found, times = ours(name, SD15, steps, noise)
            worst = max(worst, difference(found, theirs(name, SD15, steps, noise, 0.0, times)))
    print(f"{name}: largest difference from diffusers {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [1000, 400])
def test_the_noise_table_is_that_of_training(schedule: str, count: int) -> None:
    """Equal to diffusers' to the last bit, but for what fused arithmetic may change on another platform."""
    fields = {"beta_schedule": schedule, "num_train_timesteps": count, "beta_start": 0.00085, "beta_end": 0.012}
    table = alphas_cumprod(published("ddim", fields).read("DDIMScheduler"))
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, diffusers.DDIMScheduler(**fields).alphas_cumprod.numpy(), rtol=2e-6)


@pytest.mark.parametrize("name", samplers())
def test_a_perfect_model_is_recovered(name: str) -> None:
    """A model that knows the clean latent leads every sampler to it, through whatever noise is added on the way."""
    rng = np.random.default_rng(0)
    clean = rng.standard_normal(SHAPE, dtype=np.float32)
    sampler = make_sampler(name, published(name, {"prediction_type": "sample", "clip_sample": False}), 12)

    def fresh() -> np.ndarray:
        return rng.standard_normal(SHAPE, dtype=np.float32)

    walk, steps = Walk(sampler, fresh(), fresh), []
    while walk.latents is None:
        steps.append(walk.step)
        np.testing.assert_allclose(walk.advance(clean), clean)
    assert walk.step == 12 and steps == sorted(steps) and {*steps} == {*range(12)}
    left = sampler.schedule.sigma[-1] / sampler.schedule.alpha[-1]  # some classes end at the least noise of training
    np.testing.assert_allclose(walk.latents, clean, atol=1e-5 + 6 * left)


@pytest.mark.parametrize("name", samplers())
def test_what_a_walk_is_given_stays_as_it_was(name: str) -> None:
    noise = np.ones(SHAPE, np.float32)
    walk = Walk(make_sampler(name, SchedulerConfig.parse(SD15), 4), noise, lambda: noise)
    while walk.latents is None:
        walk.advance(noise)
    assert (noise == 1).all()


@pytest.mark.parametrize(
    ("name", "steps", "eta", "field"),
    [
        ("eular", 20, 0.0, "sampler"),
        ("euler", 0, 0.0, "steps"),
        ("euler", 1_000_000, 0.0, "steps"),
        ("ddim", 1000, 0.0, "steps"),  # with steps_offset 1 the first timestep would be 1000
        ("dpmpp_2m", 1000, 0.0, "steps"),
        ("ddim", 20, 1.5, "eta"),
        ("euler", 20, 0.5, "eta"),
        ("ddim", 20, float("nan"), "eta"),
    ],
)
def test_bad_arguments_are_named(name: str, steps: int, eta: float, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        make_sampler(name, SchedulerConfig.parse(SD15), steps, eta)
    assert caught.value.field == field


def test_ddim_from_pure_noise_with_a_noise_predicting_model_is_refused() -> None:
    config = published("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    with pytest.raises(InvalidInput, match="euler"):
        make_sampler("ddim", config, 10)


@pytest.mark.parametrize(
    ("name", "stale"),
    [
        (
            "ddim",
            {
                "use_karras_sigmas": True,
                "algorithm_type": "sde-dpmsolver++",
                "interpolation_type": "log_linear",
                "final_sigmas_type": "x",
            },
        ),
        ("ddim", {"tensor_format": "pt", "timestep_values": None, "predict_epsilon": False, "sigma_max": 9.0}),
        ("euler", {"set_alpha_to_one": False, "clip_sample": True, "skip_prk_steps": True, "lambda_min_clipped": -1.0}),
        (
            "euler_ancestral",
            {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "interpolation_type": "log_linear"},
        ),
        (
            "dpmpp_2m",
            {
                "set_alpha_to_one": False,
                "clip_sample": True,
                "interpolation_type": "log_linear",
                "solver_type": "logrho",
            },
        ),
    ],
)
def test_fields_of_other_classes_change_nothing(name: str, stale: dict[str, Any], tmp_path: Any) -> None:
    """Each file is loaded by the class that it names, on either side, with what another class left in it."""
    class_name = class_of(name)
    file = SD15 | stale | {"_class_name": class_name}
    config = SchedulerConfig.parse(file)
    assert config.sampler == name and not config.note
    (tmp_path / "scheduler_config.json").write_text(json.dumps(file))
    noise = noises(10, 0)
    found, times = ours(name, file, 10, noise)
    with pytest.MonkeyPatch.context() as patch:
        loaded = getattr(diffusers, class_name).from_pretrained(tmp_path)
        patch.setattr(getattr(diffusers, class_name), "from_config", lambda *args, **kwargs: loaded)
        expected = theirs(name, file, 10, noise, 0.0, times)
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["euler_karras", "dpmpp_2m_karras", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_walks_that_end_at_the_least_noise_of_training(name: str, schedule: str) -> None:
    """Where the last step is none at all, up to rounding."""
    config = SD15 | {"_class_name": class_of(name), "final_sigmas_type": "sigma_min", "beta_schedule": schedule}
    for steps in range(1, 60):
        noise = noises(steps, steps)
        found, times = ours(name, config, steps, noise)
        expected = theirs(name, config, steps, noise, 0.0, times)
        assert not np.isfinite(expected).all() or difference(found, expected) <= TOLERANCE


def test_every_solver_has_a_counterpart() -> None:
    assert CLASSES.keys() == solvers().keys()
