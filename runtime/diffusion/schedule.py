"""A schedule: the points at which a model is evaluated on the way from noise to clean latents.

At every point the latents are x = alpha x₀ + sigma ε, with clean latents x₀ and standard normal noise ε. All noise
schedules are of this form, so that a solver needs to know only the arrays alpha and sigma:

    variance preserving   alpha² + sigma² = 1   Ho et al. 2020 (arXiv 2006.11239), Song et al. 2020 (arXiv 2011.13456)
    variance exploding    alpha = 1             Karras et al. 2022 (arXiv 2206.00364)
    flow matching         alpha + sigma = 1     Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022 (2209.03003)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Latents = NDArray[np.float32]

GAUSS: Final = np.polynomial.legendre.leggauss(16)
"""Positions and weights of the rule of 16 points on -1 to 1."""


class Point(NamedTuple):
    """A point of a schedule. `time` is the timestep that the model receives there; `step` counts the steps before it.

    A solver that evaluates the model between two points of its schedule makes a point of its own, with the earlier
    one's `step`.
    """

    alpha: float
    sigma: float
    time: float
    step: int

    @property
    def level(self) -> float:
        """Noise over signal."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> float:
        """The logarithm of signal over noise, "lambda" in the papers on DPM-Solver."""
        if not self.sigma:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf

    def noised(self, clean: Latents, noise: Latents) -> Latents:
        """Clean latents with standard normal noise, as they are at this point: `add_noise` of diffusers' schedulers."""
        return np.asarray(np.float32(self.alpha) * clean + np.float32(self.sigma) * noise)


class Estimate(NamedTuple):
    """What a model's output says of latents x = alpha x₀ + sigma ε: both parts, float32, of the shape of x."""

    clean: Latents
    noise: Latents


@dataclass(frozen=True)
class Prediction:
    """A quantity that models are trained to predict.

    `scale` is the factor between the latents of a point (alpha, sigma) and those that such a model was trained on.
    `estimate` takes the model's input, its output, and alpha and sigma of the input. `output` takes an estimate, alpha
    and sigma, and gives the output that such a model would have for it.
    """

    scale: Callable[[float, float], float]
    estimate: Callable[[Latents, Latents, float, float], Estimate]
    output: Callable[[Estimate, float, float], Latents]


def _epsilon(x: Latents, output: Latents, alpha: float, sigma: float) -> Estimate:
    return Estimate(x / alpha - (sigma / alpha) * output, output)


def _velocity(x: Latents, output: Latents, alpha: float, sigma: float) -> Estimate:
    """Salimans and Ho 2022, section 4 (arXiv 2202.00512): v = alpha ε - sigma x₀."""
    return Estimate(alpha * x - sigma * output, alpha * output + sigma * x)


def _sample(x: Latents, output: Latents, alpha: float, sigma: float) -> Estimate:
    return Estimate(output, x / sigma - (alpha / sigma) * output)


def _flow(x: Latents, output: Latents, alpha: float, sigma: float) -> Estimate:
    """Liu et al. 2022, equation (1), from clean to noise: the output is ε - x₀."""
    return Estimate(x - sigma * output, x + alpha * output)


PREDICTIONS: Final = {
    "epsilon": Prediction(math.hypot, _epsilon, lambda found, alpha, sigma: found.noise),
    "v_prediction": Prediction(
        math.hypot, _velocity, lambda found, alpha, sigma: alpha * found.noise - sigma * found.clean
    ),
    "sample": Prediction(math.hypot, _sample, lambda found, alpha, sigma: found.clean),
    "flow_prediction": Prediction(operator.add, _flow, lambda found, alpha, sigma: found.noise - found.clean),
}
"""Every kind of prediction, by the name that scheduler files have for it."""


@dataclass(frozen=True)
class Schedule:
    """n steps from noise to clean latents: `alpha` and `sigma` float64 [n + 1], before each step and after the last;
    `time` float32 [n], what the model receives before each step.

    `start` is the standard deviation of the noise that the first step starts from. `clip` bounds the absolute values
    of estimated clean latents. `first` is the step to begin with, n for no step at all: a picture is changed by the
    later steps alone. `end` is the step to stop before, None for after the last: another model may go on from there.
    """

    alpha: Floats
    sigma: Floats
    time: Latents
    prediction: str = "epsilon"
    start: float = 1.0
    clip: float = math.inf
    first: int = 0
    end: int | None = None

    def __len__(self) -> int:
        return len(self.time)

    @property
    def steps(self) -> range:
        """The indices of the steps to take."""
        return range(self.first, len(self) if self.end is None else self.end)

    def scale(self, point: Point) -> float:
        """The factor between latents of a point and those that the model was trained on."""
        return PREDICTIONS[self.prediction].scale(point.alpha, point.sigma)

    def noised(self, clean: Latents, noise: Latents) -> Latents:
        """Clean latents with standard normal noise, as they are before step `first`; without noise where no step is
        taken.
        """
        return self.point(self.first).noised(clean, noise) if self.steps else clean

    def point(self, index: int) -> Point:
        """The point before step `index`, 0 to n. The last, after all steps, has time 0."""
        time = float(self.time[index]) if index < len(self) else 0.0
        return Point(float(self.alpha[index]), float(self.sigma[index]), time, index)

    def model_input(self, x: Latents, point: Point) -> Latents:
        """Latents x of that point as the model was trained on them."""
        return x / self.scale(point)

    def estimate(self, x: Latents, output: Latents, point: Point) -> Estimate:
        """The clean latents and the noise that the model's output implies. `output` is the model's for `model_input` of
        x at the point.
        """
        prediction, scale = PREDICTIONS[self.prediction], self.scale(point)
        clean, noise = prediction.estimate(x / scale, output, point.alpha / scale, point.sigma / scale)
        return Estimate(clean if math.isinf(self.clip) else clean.clip(-self.clip, self.clip), noise)

    def output(self, estimate: Estimate, point: Point) -> Latents:
        """The model's output that implies this estimate at the point: the reverse of `estimate`."""
        prediction, scale = PREDICTIONS[self.prediction], self.scale(point)
        return prediction.output(estimate, point.alpha / scale, point.sigma / scale)


def along(x: Latents, clean: Latents, now: Point, alpha: float, sigma: float) -> Latents:
    """Latents at (alpha, sigma) with these clean latents and the noise that x, of the point `now`, has beside them."""
    noise: Latents = x - now.alpha * clean
    return alpha * clean + sigma / now.sigma * noise


def weighted(weights: Iterable[float], arrays: Iterable[Latents]) -> Latents:
    """The sum of the arrays, each times its weight, float32. There are as many of both."""
    terms = [float(weight) * array for weight, array in zip(weights, arrays, strict=True)]
    return sum(terms[1:], start=terms[0])


def ancestral(now: Point, after: Point) -> tuple[float, float]:
    """How an ancestral step to `after` is split: the sigma to go down to, then that of the noise to add. The sum of
    their squares is the square of the point's own.
    """
    kept = after.sigma * now.alpha / (now.sigma * after.alpha)
    return after.sigma * kept, after.sigma * math.sqrt(1 - kept**2)


def lagrange_integrals(
    nodes: Sequence[float], start: float, stop: float, weight: Callable[[Floats], Floats] = np.ones_like
) -> Floats:
    """The integral of weight(t) from `start` to `stop` times each Lagrange polynomial over the nodes, float64.

    Gauss and Legendre's rule: exact to rounding for polynomials, and for an exponential weight over the ranges here.
    """
    positions, weights = GAUSS
    t = start + (stop - start) * (positions + 1) / 2
    weights = weights * weight(t) * (stop - start) / 2
    basis = [[(t - other) / (node - other) for other in nodes if other != node] for node in nodes]
    return np.array([(weights * np.prod([np.ones_like(t), *factors], axis=0)).sum() for factors in basis])


def variance_preserving(levels: Floats) -> tuple[Floats, Floats]:
    """Alpha and sigma of noise levels (noise over signal) where alpha² + sigma² = 1."""
    signal = 1 / (1 + levels**2)
    return np.sqrt(signal), np.sqrt(1 - signal)


def flow_matching(steps: int, *, shift: float = 1.0, timesteps: int = 1000) -> Schedule:
    """The schedule of a flow matching model: sigma falls evenly from 1 to its least value in training, and is then
    moved towards noise by `shift` (Esser et al. 2024, equation 23; arXiv 2403.03206). After the last step it is 0.

    Equals diffusers 0.42 (FlowMatchEulerDiscreteScheduler), which shifts the ends of training a first time before.
    """

    def shifted(sigma: Floats) -> Floats:
        return shift * sigma / (1 + (shift - 1) * sigma)

    first, last = shifted(np.array([1.0, 1 / timesteps]))
    sigma = shifted(np.linspace(first, last, steps))
    time = (sigma * timesteps).astype(np.float32)
    sigma = np.append(sigma, 0.0)
    return Schedule(1 - sigma, sigma, time, "flow_prediction")
