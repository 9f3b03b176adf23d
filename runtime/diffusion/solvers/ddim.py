"""DDIM: Song, Meng and Ermon 2020, formulas (12) and (16) (arXiv 2010.02502). Equals diffusers' DDIMScheduler 0.42."""

from __future__ import annotations

import math
from functools import partial

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Floats, Latents, Schedule
from runtime.diffusion.scheduling import strided
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps


def ddim(
    schedule: Schedule, x: Latents, fresh: Noise, eta: float = 0.0, ends: tuple[Floats, Floats] | None = None
) -> Steps:
    """Estimate clean latents and noise, and mix both for the next point. `eta` 0 is deterministic, 1 is DDPM.

    `ends` are alpha and sigma after each step, float64 [n], where they are not those before the next one.
    """
    alphas, sigmas = ends or (schedule.alpha[1:], schedule.sigma[1:])
    for index in schedule.steps:
        now = schedule.point(index)
        alpha, sigma = float(alphas[index]), float(sigmas[index])
        clean, noise = yield x, now
        kept = sigma * now.alpha / (now.sigma * alpha)
        variance = (eta * sigma) ** 2 * (1 - kept**2)
        x = alpha * clean + math.sqrt(max(sigma**2 - variance, 0.0)) * noise
        if eta:
            x = x + math.sqrt(max(variance, 0.0)) * fresh()
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    schedule, ends = strided(fields, steps)
    return Sampler(schedule, partial(ddim, eta=options.eta, ends=ends))


SOLVER = Solver(prepare, eta=True)
