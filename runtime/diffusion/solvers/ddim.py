"""DDIM: Song, Meng and Ermon 2020, formulas (12) and (16) (arXiv 2010.02502). Equals diffusers' DDIMScheduler 0.42."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Floats, Latents, Schedule
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import spaced, trained_on
from runtime.diffusion.training import alphas_cumprod
from runtime.errors import InvalidInput


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
    """Steps as diffusers takes them: each ends a whole stride of training timesteps further, which with some spacings
    is not quite where the next one begins.
    """
    timesteps = trained_on(np.round(spaced(fields, fields.timestep_spacing or "leading", steps)), fields)
    table = alphas_cumprod(fields).astype(np.float64)
    index = timesteps.astype(np.int64)
    before = index - fields.num_train_timesteps // steps
    after = np.where(before >= 0, table[before.clip(0)], 1.0 if fields.set_alpha_to_one else table[0])
    if fields.prediction_type == "epsilon" and table[index[0]] == 0:
        raise InvalidInput(
            "sampler",
            "ddim cannot start from pure noise (rescale_betas_zero_snr) where the model predicts noise: use euler",
        )
    signal = np.append(table[index], after[-1])
    schedule = Schedule(
        np.sqrt(signal),
        np.sqrt(1 - signal),
        timesteps.astype(np.float32),
        fields.prediction_type,
        clip=fields.clip_sample_range if fields.clip_sample else math.inf,
    )
    return Sampler(schedule, partial(ddim, eta=options.eta, ends=(np.sqrt(after), np.sqrt(1 - after))))


SOLVER = Solver(prepare, eta=True)
