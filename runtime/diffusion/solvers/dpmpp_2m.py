"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2; arXiv 2211.01095), in the midpoint form or Heun's. Equals diffusers'
DPMSolverMultistepScheduler 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Final

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Point, Schedule, weighted
from runtime.diffusion.scheduling import preserving
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import USUAL

FEW_STEPS: Final = 15
"""Below this many steps the last ones are of lower order, for stability (`lower_order_final`)."""
Past = Sequence[tuple[float, Latents]]
"""The log of signal over noise at the last points, the newest first, and the estimates of the clean latents there."""


def dpmpp_2m(
    schedule: Schedule,
    x: Latents,
    fresh: Noise,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    heun: bool = False,
    most: int = 2,
    noisy: bool = False,
) -> Steps:
    """Extrapolate from the last `most` (1 to 3) estimates of the clean latents. With `noisy` the equation is the
    stochastic one, and every step but one to no noise draws once.
    """
    past: Past = ()
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        past = ((now.log_snr, clean), *past[: most - 1])
        order = order_of(schedule, index, most, lower_order_final, euler_at_final)
        target = extrapolated(past[:order], after.log_snr - now.log_snr, heun, noisy)
        x = _noisy_step(x, now, after, target, fresh) if noisy else step(x, now, after, target)
    return x


def order_of(schedule: Schedule, index: int, most: int, lower_order_final: bool, euler_at_final: bool = False) -> int:
    """How many estimates a step makes use of: as many as there are, and fewer at the end."""
    left, few = len(schedule) - index, lower_order_final and len(schedule) < FEW_STEPS
    # at no noise the log of signal over noise is infinite and a higher order undefined
    if left == 1 and (few or euler_at_final or not schedule.sigma[-1]):
        return 1
    return min(most, index - schedule.first + 1, 2 if few and left == 2 else most)


def step(x: Latents, now: Point, after: Point, target: Latents) -> Latents:
    """The exact solution of the equation where the clean latents are `target` all along."""
    shrink = after.sigma * now.alpha / (now.sigma * after.alpha)  # e^-h, where h is the step in log_snr
    return after.sigma / now.sigma * x + after.alpha * (1 - shrink) * target


def _noisy_step(x: Latents, now: Point, after: Point, target: Latents, fresh: Noise) -> Latents:
    """The same of the stochastic equation."""
    shrink = after.sigma * now.alpha / (now.sigma * after.alpha)
    x = after.sigma / now.sigma * shrink * x + after.alpha * (1 - shrink**2) * target
    return x + after.sigma * math.sqrt(1 - shrink**2) * fresh() if after.sigma else x


def extrapolated(past: Past, h: float, heun: bool = False, noisy: bool = False) -> Latents:
    """The clean latents that stand for a step of `h` in log_snr: the Taylor expansion from the newest estimate on, with
    divided differences of one to three estimates for derivatives.
    """
    (now, clean), *older = past
    if not older or not h:
        return clean
    (before, previous), *oldest = older
    if not oldest:
        weight = _taylor(2 * h if noisy else h)[0] if heun else 0.5
        change: Latents = clean - previous
        return clean + weight * h / (now - before) * change
    ((first, earliest),) = oldest
    near, far, bend = h / (now - before), h / (before - first), h / (now - first)
    slope = weighted((near, -near), (clean, previous))
    slope_before = weighted((far, -far), (previous, earliest))
    curve = weighted((bend, -bend), (slope, slope_before))
    once, twice = _taylor(h)
    return weighted((1, once, once / near + twice), (clean, slope, curve))


def _taylor(h: float) -> tuple[float, float]:
    """The weights of the first and second derivative, where the estimate itself has weight 1."""
    gain = -math.expm1(-h)
    return (1 - gain / h) / gain, (0.5 - (h - gain) / h**2) / gain


def prepare(fields: SchedulerFields, steps: int, options: Options, most: int = 2, noisy: bool = False) -> Sampler:
    solve = partial(
        dpmpp_2m,
        lower_order_final=fields.lower_order_final,
        euler_at_final=fields.euler_at_final,
        heun=fields.solver_type == "heun",
        most=most,
        noisy=noisy,
    )
    return Sampler(preserving(fields, steps, options, truncate_cosine=True), solve)


SOLVER = Solver(prepare, (*USUAL, "lu"))
