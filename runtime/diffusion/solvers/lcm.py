"""Latent consistency models: Luo et al. 2023, algorithm 3 (arXiv 2310.04378). Equals diffusers' LCMScheduler 0.42."""

from __future__ import annotations

from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Floats, Latents, Schedule
from runtime.diffusion.scheduling import at_timesteps
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.errors import InvalidInput

DATA_VARIANCE = 0.25
"""That of clean latents, which the boundary condition is scaled by."""


def lcm(schedule: Schedule, x: Latents, fresh: Noise, timestep_scaling: float = 10.0) -> Steps:
    """Straight to clean latents, and back to the next point with fresh noise."""
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        distance = (now.time * timestep_scaling) ** 2
        kept = DATA_VARIANCE / (distance + DATA_VARIANCE)
        clean = (1 - kept) ** 0.5 * clean + kept * x
        x = after.alpha * clean + after.sigma * fresh() if after.sigma else clean
    return x


def distilled(fields: SchedulerFields, steps: int, share: float = 1.0) -> Floats:
    """Timesteps among those of the distillation, float64 [steps], of which only the `share` with the least noise is
    taken. Raises InvalidInput naming `steps` or `strength`.
    """
    taught, trained = fields.original_inference_steps, fields.num_train_timesteps
    if taught > trained:
        raise InvalidInput("scheduler", f"original_inference_steps is {taught}, expected at most {trained} timesteps")
    if steps > taught:
        raise InvalidInput(
            "steps", f"is {steps}, expected 1 to {taught}, the timesteps that such a model is distilled on"
        )
    count = int(taught * share)
    if steps > count:
        raise InvalidInput(
            "strength", f"is {share:g}, which leaves {count} of the {taught} timesteps that such a model is distilled "
            f"on: take at most {count} steps, or a strength of {steps / taught:.2g}; 0 keeps the picture"
        )  # fmt: skip
    timesteps = np.arange(count, 0, -1) * (trained // taught) - 1
    return timesteps[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(np.int64)].astype(np.float64)


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    schedule = at_timesteps(fields, distilled(fields, steps, options.share))
    return Sampler(schedule, partial(lcm, timestep_scaling=fields.timestep_scaling))


SOLVER = Solver(prepare, share=True)
