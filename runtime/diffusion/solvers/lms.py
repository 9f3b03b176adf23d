"""Linear multistep: Adams and Bashforth's method of fourth order over uneven noise levels (Crowson's k-diffusion,
sample_lms). Equals diffusers' LMSDiscreteScheduler 0.42.
"""

from __future__ import annotations

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Schedule, lagrange_integrals, weighted
from runtime.diffusion.scheduling import exploding
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import USUAL

ORDER = 4


def lms(schedule: Schedule, x: Latents, fresh: Noise) -> Steps:
    """Integrate the polynomial through the last four estimates of the noise."""
    levels: list[float] = []
    noises: list[Latents] = []
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        _, noise = yield x, now
        levels, noises = [now.level, *levels[: ORDER - 1]], [noise, *noises[: ORDER - 1]]
        weights = lagrange_integrals(levels, now.level, after.level)
        x = after.alpha / now.alpha * x + after.alpha * weighted(weights, noises)
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    return Sampler(exploding(fields, steps, options), lms)


SOLVER = Solver(prepare, USUAL)
