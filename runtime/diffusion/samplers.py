"""Samplers: how a noisy latent is walked back to a clean one, in numpy. Small pure objects: state in, state out.

    sampler = make_sampler("dpmpp_2m_karras", config, steps=20)
    state = State(noise * sampler.init_noise_sigma)
    for timestep in sampler.timesteps:
        output = model(sampler.model_input(state), timestep)
        state = sampler.step(state, output, fresh_noise if sampler.stochastic else None)

Every algorithm reads one description of the trajectory: the signal share ᾱ (alpha bar, 1 = clean, 0 = pure noise)
before and after each step. Results equal diffusers 0.42 (DDIMScheduler, EulerDiscreteScheduler,
EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler) on the same noise, including which fields and defaults
each of them takes (`runtime.diffusion.schedules`). To start in the middle of a trajectory, as image-to-image does, give
`State` an `index` and the latent noised to `signal[index]`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.schedules import KARRAS, SOURCES, Schedule, SchedulerConfig, Spacing
from runtime.errors import InvalidInput, did_you_mean

Floats = NDArray[np.float64]
Latents = NDArray[np.float32]

ZERO_SNR_FLOOR: Final = 2.0**-24
"""Stands in for ᾱ = 0 where an algorithm divides by it: the smallest half-precision number, as in diffusers."""
KARRAS_RHO: Final = 7.0
ROUNDING: Final = 1e-6
"""Noise levels nearer than this, relative to themselves, are one: they come from float32 tables."""
FEW_STEPS: Final = 15
"""Below this many steps DPM++ takes its last step at first order, for stability (its `lower_order_final`)."""


@dataclass(frozen=True)
class State:
    """Where a trajectory stands: `latents` [batch, channels, height, width] float32 before step `index`.

    `denoised` is the last step's estimate of the clean latent: what a preview shows and what multistep methods
    remember.
    """

    latents: Latents
    index: int = 0
    denoised: Latents | None = None


@dataclass(frozen=True)
class Sampler(ABC):
    """One algorithm over one trajectory of n steps. `signal[i]` is ᾱ before step i, `signal_after[i]` after it, both
    float64 [n].
    """

    timesteps: Latents
    """What the model is told the time is, float32 [n], decreasing."""
    signal: Floats
    signal_after: Floats
    config: Schedule
    spacing: Spacing
    eta: float = 0.0

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the latents that the trajectory starts from."""
        return 1.0

    @property
    def stochastic(self) -> bool:
        """Whether `step` needs fresh noise."""
        return False

    def model_input(self, state: State) -> Latents:
        """The latents as the model expects them: of unit variance, x = √ᾱ x₀ + √(1-ᾱ) ε."""
        return state.latents

    def denoised(self, state: State, output: Latents) -> Latents:
        """The clean latent x₀ that the model's output implies. v: Salimans and Ho 2022, section 4 (arXiv
        2202.00512).
        """
        alpha, sigma = _roots(self.signal[state.index])
        x = self.model_input(state)
        match self.config.prediction_type:
            case "epsilon":
                return x / alpha - (sigma / alpha) * output
            case "v_prediction":
                return alpha * x - sigma * output
            case "sample":
                return output

    @abstractmethod
    def step(self, state: State, output: Latents, noise: Latents | None = None) -> State:
        """One step towards the clean latent. `output` is the model's prediction on `model_input(state)` at
        `timesteps[state.index]`.

        `noise` is standard normal, of the latents' shape; it is required where `stochastic`, else ignored.
        """


@dataclass(frozen=True)
class Ddim(Sampler):
    """Song, Meng and Ermon 2020, formulas (12) and (16) (arXiv 2010.02502). `eta` 0 is deterministic, 1 is DDPM."""

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, state: State, output: Latents, noise: Latents | None = None) -> State:
        now, after = self.signal[state.index], self.signal_after[state.index]
        (alpha, sigma), (alpha_after, _) = _roots(now), _roots(after)
        clean = self.denoised(state, output)
        match self.config.prediction_type:
            case "epsilon":
                epsilon = output
            case "v_prediction":
                epsilon = alpha * output + sigma * state.latents
            case "sample":
                epsilon = state.latents / sigma - (alpha / sigma) * clean
        if self.config.clip_sample:
            clean = clean.clip(-self.config.clip_sample_range, self.config.clip_sample_range)
        variance = self.eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        latents = alpha_after * clean + math.sqrt(max(1 - after - variance, 0.0)) * epsilon
        if self.stochastic:
            latents = latents + math.sqrt(max(variance, 0.0)) * _required(noise)
        return State(latents, state.index + 1, clean)


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on dx/ds = (x - x₀)/s, where x = x₀ + sε (Karras et al. 2022, algorithm 1 without churn; arXiv
    2206.00364).
    """

    def sigma(self, index: int) -> float:
        """Noise over signal before step `index`; after the last one for index n."""
        signal = self.signal[index] if index < len(self.signal) else self.signal_after[-1]
        return math.sqrt((1 - signal) / signal)

    @property
    def init_noise_sigma(self) -> float:
        top = self.sigma(0)
        return math.hypot(top, 1.0) if self.spacing == "leading" else top

    def model_input(self, state: State) -> Latents:
        return state.latents / math.hypot(self.sigma(state.index), 1.0)

    def step(self, state: State, output: Latents, noise: Latents | None = None) -> State:
        clean = self.denoised(state, output)
        ratio = self.sigma(state.index + 1) / self.sigma(state.index)
        return State(clean + ratio * (state.latents - clean), state.index + 1, clean)


@dataclass(frozen=True)
class EulerAncestral(Euler):
    """Euler's method to a lower noise level than asked for, then fresh noise up to it (Crowson's k-diffusion,
    sample_euler_ancestral).
    """

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, state: State, output: Latents, noise: Latents | None = None) -> State:
        clean = self.denoised(state, output)
        now, after = self.sigma(state.index), self.sigma(state.index + 1)
        up = after * math.sqrt(1 - (after / now) ** 2)
        down = after * (after / now)  # √(after² - up²)
        return State(clean + down / now * (state.latents - clean) + up * _required(noise), state.index + 1, clean)


@dataclass(frozen=True)
class Dpmpp2M(Sampler):
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, algorithm 2; arXiv 2211.01095)."""

    def step(self, state: State, output: Latents, noise: Latents | None = None) -> State:
        clean = self.denoised(state, output)
        now, after = self.signal[state.index], self.signal_after[state.index]
        (alpha, sigma), (alpha_after, sigma_after) = _roots(now), _roots(after)
        shrink = sigma_after * alpha / (sigma * alpha_after)  # e^-h, where h is the step in lambda = log(alpha / sigma)
        target = clean
        if state.denoised is not None and not self._first_order(state.index):
            step, last = _lambda(after) - _lambda(now), _lambda(now) - _lambda(self.signal[state.index - 1])
            target = clean + 0.5 * step / last * (clean - state.denoised)
        latents = sigma_after / sigma * state.latents + alpha_after * (1 - shrink) * target
        return State(latents, state.index + 1, clean)

    def _first_order(self, index: int) -> bool:
        steps = len(self.timesteps)
        to_zero = self.config.final_sigmas_type == "zero"  # there lambda is infinite and a second order step undefined
        return index == steps - 1 and (to_zero or (self.config.lower_order_final and steps < FEW_STEPS))


def alphas_cumprod(config: Schedule) -> NDArray[np.float32]:
    """ᾱ of every training timestep, float32 [num_train_timesteps], computed in the float32 steps that models were
    trained with.
    """
    count = config.num_train_timesteps
    betas: NDArray[np.float32]
    match config.beta_schedule:
        case _ if config.trained_betas is not None:
            betas = np.array(config.trained_betas, np.float32)
        case "linear":
            betas = _linspace(config.beta_start, config.beta_end, count)
        case "scaled_linear":
            betas = _linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
        case "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation (17) (arXiv 2102.09672)
            bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
            betas = np.array([min(1 - b / a, 0.999) for a, b in pairwise(bar)], np.float32)
    if config.rescale_betas_zero_snr:
        betas = _zero_terminal_snr(betas)
    return _cumulative(betas)


def _linspace(first: float, last: float, count: int) -> NDArray[np.float32]:
    """Evenly spaced float32 numbers, to the last bit those of torch.linspace: a float32 step, taken from the nearer
    end.
    """
    start, end = np.float32(first), np.float32(last)
    step = np.float64((end - start) / np.float32(count - 1))
    index = np.arange(count)
    return np.where(index < count // 2, start + step * index, end - step * (count - 1 - index)).astype(np.float32)


def _cumulative(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """The products of 1 - β so far: summed up in double precision, as torch does, then rounded."""
    return np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Betas shifted and scaled so that the last timestep is pure noise (Lin et al. 2023, algorithm 1; arXiv
    2305.08891).
    """
    root = np.sqrt(_cumulative(betas))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return cast(NDArray[np.float32], 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]]))


def _roots(signal: float) -> tuple[float, float]:
    """The factors (alpha, sigma) of signal and noise: √ᾱ and √(1-ᾱ)."""
    return math.sqrt(signal), math.sqrt(1 - signal)


def _lambda(signal: float) -> float:
    """Half the log of signal over noise."""
    return 0.5 * math.log(signal / (1 - signal))


def _required(noise: Latents | None) -> Latents:
    assert noise is not None, "a stochastic sampler's step needs noise"
    return noise


def _spaced(config: Schedule, spacing: Spacing, steps: int, *, beyond: int = 0, cut: int = 0) -> Floats:
    """Timesteps from noise to clean, float64 [steps], spaced as in table 2 of Lin et al. 2023 (arXiv 2305.08891).

    With `beyond` 1 the range is cut for one step more, and its clean end left out: what DPM-Solver++ does. The last
    `cut` timesteps of training are left out; with trailing there are fewer steps then.
    """
    total = config.num_train_timesteps
    match spacing:
        case "linspace":
            return np.linspace(0, total - cut - 1, steps + beyond)[::-1][:steps]
        case "leading":
            ratio = (total - cut) // (steps + beyond)
            return (np.arange(steps + beyond, dtype=np.float64) * ratio)[::-1][:steps] + config.steps_offset
        case "trailing":
            return (
                np.round(np.arange(total - cut, 0, -total / steps)[:steps]) - 1
            )  # for some counts it comes out one too long


def _karras(first: float, last: float, steps: int) -> Floats:
    """Noise levels evenly spaced in their seventh root (Karras et al. 2022, equation 5; arXiv 2206.00364)."""
    ramp = np.linspace(0, 1, steps)
    high, low = float(first) ** (1 / KARRAS_RHO), float(last) ** (1 / KARRAS_RHO)  # a float32 would stay one
    return cast(Floats, (high + ramp * (low - high)) ** KARRAS_RHO)


def _timesteps_of(sigmas: Floats, table: NDArray[np.float32]) -> Floats:
    """The timesteps at which the training schedule has these noise levels, interpolated in their logarithm."""
    logs, wanted = np.log(table), np.log(sigmas)
    # the last entry not above the wanted level: a zero-SNR table drops at its very end, so the search is in its minimum
    # from there on
    low = np.searchsorted(np.minimum.accumulate(logs[::-1])[::-1], wanted, side="right").clip(1, len(logs) - 1) - 1
    return cast(Floats, low + ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clip(0, 1))


def _noise_table(config: Schedule) -> NDArray[np.float32]:
    """Noise over signal at every training timestep, float32, finite."""
    bar = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        bar[-1] = ZERO_SNR_FLOOR
    return cast(NDArray[np.float32], np.sqrt((1 - bar) / bar))


def _checked(timesteps: Floats, config: Schedule) -> Floats:
    """The same timesteps, if the model was trained on all of them and no two are equal. Raises InvalidInput naming
    `steps`.
    """
    last, steps = config.num_train_timesteps - 1, len(timesteps)
    if not steps:
        raise InvalidInput(
            "steps", "the model's schedule (lambda_min_clipped) leaves none of so few steps. Use more steps"
        )
    if timesteps[0] > last or timesteps[-1] < 0 or not (np.diff(timesteps) < 0).all():
        raise InvalidInput(
            "steps",
            f"{steps} steps do not fit the model's schedule of timesteps 0 to {last}"
            f" (steps_offset {config.steps_offset}): some would repeat or lie outside. Use fewer steps",
        )
    return timesteps


def _trajectory(levels: Floats) -> tuple[Floats, Floats]:
    """ᾱ before and after each step between noise levels (noise over signal), float64 [steps + 1]. Raises InvalidInput
    if one rises.

    The last may stay where it is: a walk to the least noise of training often ends there one step early, up to
    rounding.
    """
    if math.isclose(levels[-1], levels[-2], rel_tol=ROUNDING):
        levels = np.append(levels[:-1], levels[-2])
    falls = np.diff(levels)
    if (falls > 0).any() or (falls[:-1] == 0).any():
        raise InvalidInput(
            "steps", f"{len(falls)} steps are too close together for the model's noise schedule. Use fewer steps"
        )
    signal = 1 / (1 + levels**2)
    return signal[:-1], signal[1:]


def _final_sigma(config: Schedule, table: NDArray[np.float32]) -> float:
    """The noise level after the last step."""
    return float(table[0]) if config.final_sigmas_type == "sigma_min" else 0.0


def _ddim(config: Schedule, steps: int, karras: bool, eta: float) -> Sampler:
    spacing = config.timestep_spacing or "leading"
    timesteps = _checked(np.round(_spaced(config, spacing, steps)), config)
    table = alphas_cumprod(config).astype(np.float64)
    index = timesteps.astype(np.int64)
    before = index - config.num_train_timesteps // steps
    after = np.where(before >= 0, table[before.clip(0)], 1.0 if config.set_alpha_to_one else table[0])
    if config.prediction_type == "epsilon" and table[index[0]] == 0:
        raise InvalidInput(
            "sampler",
            "ddim cannot start from pure noise (rescale_betas_zero_snr) where the model predicts noise: use euler",
        )
    return Ddim(timesteps.astype(np.float32), table[index], after, config, spacing, eta)


def _euler(config: Schedule, steps: int, karras: bool, eta: float) -> Sampler:
    spacing = config.timestep_spacing or "linspace"
    timesteps = _checked(_spaced(config, spacing, steps), config)
    table = _noise_table(config)
    levels = np.append(np.interp(timesteps, np.arange(len(table)), table), _final_sigma(config, table))
    first, last = levels[0], levels[-2]
    if config.interpolation_type == "log_linear":
        first, last = table[-1], table[0]
        levels = np.geomspace(first, last, steps + 1, dtype=np.float64)
    if karras:
        levels = np.append(_karras(first, last, steps), _final_sigma(config, table))
        timesteps = _timesteps_of(levels[:-1], table)
    return Euler(timesteps.astype(np.float32), *_trajectory(levels), config, spacing)


def _euler_ancestral(config: Schedule, steps: int, karras: bool, eta: float) -> Sampler:
    spacing = config.timestep_spacing or "linspace"
    timesteps = _checked(_spaced(config, spacing, steps), config)
    table = _noise_table(config)
    levels = np.append(np.interp(timesteps, np.arange(len(table)), table), 0.0)
    return EulerAncestral(timesteps.astype(np.float32), *_trajectory(levels), config, spacing)


def _dpmpp_2m(config: Schedule, steps: int, karras: bool, eta: float) -> Sampler:
    spacing = config.timestep_spacing or "linspace"
    table = _noise_table(config)
    if karras:
        levels = _karras(table[-1], table[0], steps)
        timesteps = _timesteps_of(levels, table)
        # diffusers rounds, except on the cosine schedule, where it truncates
        timesteps = np.floor(timesteps) if config.beta_schedule == "squaredcos_cap_v2" else np.round(timesteps)
    else:
        extra = 0 if spacing == "trailing" else 1
        cut = int((np.log(table) > -config.lambda_min_clipped).sum())
        timesteps = _checked(np.round(_spaced(config, spacing, steps, beyond=extra, cut=cut)), config)
        levels = table[timesteps.astype(np.int64)].astype(np.float64)
    return Dpmpp2M(
        timesteps.astype(np.float32), *_trajectory(np.append(levels, _final_sigma(config, table))), config, spacing
    )


@dataclass(frozen=True)
class _Recipe:
    """How a named sampler is made."""

    make: Callable[[Schedule, int, bool, float], Sampler]
    karras: bool = False


_RECIPES: Final = {
    "ddim": _Recipe(_ddim),
    "euler": _Recipe(_euler),
    "euler_karras": _Recipe(_euler, karras=True),
    "euler_ancestral": _Recipe(_euler_ancestral),
    "dpmpp_2m": _Recipe(_dpmpp_2m),
    "dpmpp_2m_karras": _Recipe(_dpmpp_2m, karras=True),
}
SAMPLERS: Final = tuple(_RECIPES)
"""Every sampler's name, as users say it."""


def make_sampler(name: str, config: SchedulerConfig, steps: int, eta: float = 0.0) -> Sampler:
    """The sampler of that name (one of `SAMPLERS`) over `steps` steps. `eta` 0 to 1 is how much fresh noise DDIM adds.

    Raises InvalidInput naming `sampler`, `steps`, `eta` or `scheduler` when the name is unknown, the steps do not fit
    the model's schedule, eta is given to a sampler that has none, or the schedule has a value that this sampler cannot
    take.
    """
    if name not in _RECIPES:
        raise InvalidInput("sampler", f"'{name}' is not known: {did_you_mean(name, SAMPLERS)}")
    schedule = config.read(SOURCES[name.removesuffix(KARRAS)])
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise InvalidInput(
            "steps", f"is {steps}, expected 1 to {schedule.num_train_timesteps}, the timesteps the model was trained on"
        )
    if not 0 <= eta <= 1:
        raise InvalidInput("eta", f"is {eta}, expected 0 to 1")
    if eta and name != "ddim":
        raise InvalidInput("eta", f"is {eta}, but only the sampler ddim has it: leave it 0 for {name}")
    recipe = _RECIPES[name]
    return recipe.make(schedule, steps, recipe.karras, eta)
