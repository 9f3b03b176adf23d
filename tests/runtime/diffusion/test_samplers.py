"""Every sampler against its diffusers counterpart, on the same noise and the same model outputs."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.diffusion.published import SchedulerConfig
from runtime.diffusion.solver import Sampler, Walk, make_sampler, samplers
from runtime.diffusion.training import alphas_cumprod
from runtime.errors import InvalidInput

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # torch tensors inside diffusers

CLASSES = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
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
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1, -2.0]),
        "trained_betas": st.sampled_from([1000, 400]).map(lambda count: np.linspace(0.001, 0.02, count).tolist()),
    },
)


def published(name: str, config: dict[str, Any]) -> SchedulerConfig:
    """A file of the class that the sampler equals, where it does not name one."""
    return SchedulerConfig.parse({"_class_name": CLASSES[name][0], **config})


def reference(name: str, config: dict[str, Any], steps: int) -> Any:
    """The diffusers scheduler of that name, on that config, its steps set."""
    class_name, extra = CLASSES[name]
    scheduler = getattr(diffusers, class_name).from_config(config, **extra)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a repeated first timestep makes it skip one
    return scheduler


def model(x: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth function of latents and time, of the size of a noise prediction."""
    return (np.tanh(x + 0.3) * np.float32(np.cos(timestep / 300)) + 0.1 * x[:, ::-1]).astype(np.float32)


def theirs(
    name: str, config: dict[str, Any], steps: int, noise: np.ndarray, eta: float, patch: pytest.MonkeyPatch
) -> np.ndarray:
    scheduler = reference(name, config, steps)
    stream = iter(noise[1:])
    for module in ("ddim", "euler_ancestral_discrete"):
        drawn = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
        patch.setattr(drawn, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(next(stream)))
    latents = torch.from_numpy(noise[0]) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = model(scheduler.scale_model_input(latents, timestep).numpy(), float(timestep))
        latents = scheduler.step(
            torch.from_numpy(output), timestep, latents, **({"eta": eta} if name == "ddim" else {})
        ).prev_sample
    return np.asarray(latents.numpy())


def ours(name: str, config: dict[str, Any], steps: int, noise: np.ndarray, eta: float) -> np.ndarray:
    return walked(make_sampler(name, published(name, config), steps, eta), noise)


def walked(sampler: Sampler, noise: np.ndarray) -> np.ndarray:
    """The latents that a sampler ends with, from the first of the noises on, the others as its fresh noise."""
    stream = iter(noise[1:])
    walk = Walk(sampler, noise[0], lambda: next(stream))
    while walk.latents is None:
        walk.advance(model(walk.x, walk.time))
    assert walk.latents.dtype == np.float32
    return walk.latents


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, relative to the larger of 1 and the reference's largest value."""
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


def theirs_is_sound(name: str, config: dict[str, Any], steps: int) -> bool:
    """Whether diffusers' timesteps all lie in the training, none comes twice, and noise never rises from step to step.

    It may rise at the start where `rescale_betas_zero_snr` puts 2**-24 behind a smaller value.
    """
    try:
        scheduler = reference(name, config, steps)
    except IndexError:
        return False
    timesteps = scheduler.timesteps.numpy()
    if name != "ddim" and (np.diff(scheduler.sigmas.numpy()) > 0).any():
        return False
    last = config.get("num_train_timesteps", 1000) - 1
    return bool(timesteps.size and timesteps.max() <= last and timesteps.min() >= 0 and (np.diff(timesteps) < 0).all())


@pytest.mark.parametrize("name", samplers())
@settings(max_examples=40, deadline=None)
@given(
    config=configs,
    steps=st.one_of(st.integers(1, 60), st.integers(61, 300)),
    eta=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_equals_diffusers(name: str, config: dict[str, Any], steps: int, eta: float, seed: int) -> None:
    """Timesteps, starting noise and result, over the whole space of supported configs."""
    assume(not (name == "euler_ancestral" and config.get("prediction_type") == "sample"))  # diffusers lacks it
    assume(
        len(config.get("trained_betas", [0] * config.get("num_train_timesteps", 1000)))
        == config.get("num_train_timesteps", 1000)
    )
    eta = eta if name == "ddim" else 0.0
    try:
        sampler = make_sampler(name, published(name, config), steps, eta)
    except InvalidInput as error:
        assert error.field in ("steps", "sampler")
        assert not theirs_is_sound(name, config, steps) or error.field != "steps", str(error)
        assume(False)
    if config.get(
        "rescale_betas_zero_snr"
    ):  # there torch's square root is off by a last bit, which decides rounded and cosine timesteps
        assume("karras" not in name and config.get("beta_schedule") != "squaredcos_cap_v2")
    if (
        config.get("timestep_spacing") == "trailing"
    ):  # for some counts, such as 61 of 1000, diffusers takes a step too many
        total = config.get("num_train_timesteps", 1000)
        assume(len(np.arange(total, 0, -total / steps)) == steps)
    scheduler = reference(name, config, steps)
    np.testing.assert_allclose(sampler.schedule.time, scheduler.timesteps.numpy(), atol=2e-3)
    # A last bit of float32 in a value near 1 is a larger share of what is left to 1.
    rel = 2e-4 if config.get("rescale_betas_zero_snr") else 1e-5
    assert sampler.schedule.start == pytest.approx(float(scheduler.init_noise_sigma), rel=rel)
    noise = np.random.default_rng(seed).standard_normal((steps + 1, *SHAPE), dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        expected = theirs(name, config, steps, noise, eta, patch)
    assume(bool(np.isfinite(expected).all()))
    # diffusers subtracts float32 numbers as large as the starting noise, which with a cosine schedule is 20,000 times
    # the signal
    allowed = TOLERANCE + 1e-6 * float(scheduler.init_noise_sigma)
    assert difference(ours(name, config, steps, noise, eta), expected) <= allowed


@pytest.mark.parametrize("name", samplers())
def test_stable_diffusion_config_at_usual_steps(name: str) -> None:
    """Stable Diffusion 1.5's own file: every step count to 50, and the worst difference printed."""
    worst = 0.0
    for steps in (*range(1, 51), 100, 250):
        noise = np.random.default_rng(steps).standard_normal((steps + 1, *SHAPE), dtype=np.float32)
        with pytest.MonkeyPatch.context() as patch:
            worst = max(
                worst, difference(ours(name, SD15, steps, noise, 0.0), theirs(name, SD15, steps, noise, 0.0, patch))
            )
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

    walk = Walk(sampler, fresh(), fresh)
    for step in range(12):
        assert (walk.step, walk.latents) == (step, None)
        np.testing.assert_array_equal(walk.advance(clean), clean)
    assert walk.step == 12 and walk.latents is not None
    np.testing.assert_allclose(walk.latents, clean, atol=1e-5)


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
    class_name = CLASSES[name][0]
    file = SD15 | stale | {"_class_name": class_name}
    config = SchedulerConfig.parse(file)
    assert config.sampler == name and not config.note
    (tmp_path / "scheduler_config.json").write_text(json.dumps(file))
    noise = np.random.default_rng(0).standard_normal((11, *SHAPE), dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        loaded = getattr(diffusers, class_name).from_pretrained(tmp_path)
        patch.setattr(getattr(diffusers, class_name), "from_config", lambda *args, **kwargs: loaded)
        expected = theirs(name, file, 10, noise, 0.0, patch)
    assert difference(ours(name, file, 10, noise, 0.0), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["euler_karras", "dpmpp_2m_karras", "euler", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_walks_that_end_at_the_least_noise_of_training(name: str, schedule: str) -> None:
    """Where the last step is none at all, up to rounding."""
    config = SD15 | {"_class_name": CLASSES[name][0], "final_sigmas_type": "sigma_min", "beta_schedule": schedule}
    for steps in range(1, 60):
        noise = np.random.default_rng(steps).standard_normal((steps + 1, *SHAPE), dtype=np.float32)
        with pytest.MonkeyPatch.context() as patch:
            expected = theirs(name, config, steps, noise, 0.0, patch)
        assert (
            not np.isfinite(expected).all() or difference(ours(name, config, steps, noise, 0.0), expected) <= TOLERANCE
        )
