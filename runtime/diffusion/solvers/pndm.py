"""PNDM: Liu et al. 2022, algorithms 1 and 2 (arXiv 2202.09778): Adams and Bashforth's method of fourth order on the
model's outputs. Equals diffusers' PNDMScheduler 0.42.

The first outputs come from three steps of Runge and Kutta's method, or, with `skip_prk_steps` (PLMS, what Stable
Diffusion is published with), from one step of Heun's and lower orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Final

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Estimate, Floats, Latents, Point, Schedule, weighted
from runtime.diffusion.scheduling import strided
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.training import alphas_cumprod
from runtime.errors import InvalidInput

At = Callable[[float, int], Point]
"""The point of a timestep, in a step."""
WEIGHTS: Final = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Of the last outputs, the newest first."""


def pndm(
    schedule: Schedule, x: Latents, fresh: Noise, ends: tuple[Floats, Floats], at: At, stride: int, warm_up: int
) -> Steps:
    """`ends` are alpha and sigma after each step, `stride` how many timesteps a step is, `warm_up` how many of the
    first steps are of Runge and Kutta's method.
    """
    outputs: list[Latents] = []
    for index in schedule.steps:
        now, end = schedule.point(index), Point(float(ends[0][index]), float(ends[1][index]), 0.0, index)
        output = schedule.output((yield x, now), now)
        outputs = [output, *outputs[:3]]
        begun, ends_here = index - schedule.first, index + 1 == len(schedule)
        if begun < warm_up and not ends_here:
            x = yield from _runge_kutta(schedule, x, output, index, at, stride // 2)
        elif not begun and not ends_here:
            following = schedule.point(index + 1)._replace(step=index)
            ahead = schedule.output((yield _moved(schedule, x, now, end, output), following), following)
            x = _moved(
                schedule, x, at(following.time + stride, index), following, weighted((0.5, 0.5), (ahead, output))
            )
        else:
            x = _moved(schedule, x, now, end, weighted(WEIGHTS[len(outputs) - 1], outputs))
    return x


def _runge_kutta(
    schedule: Schedule, x: Latents, output: Latents, index: int, at: At, half: int
) -> Generator[tuple[Latents, Point], Estimate, Latents]:
    """One step of fourth order. The middle is half a stride before the step's end."""
    now, after = schedule.point(index), schedule.point(index + 1)._replace(step=index)
    middle = at(after.time + half, index)
    outputs = [output]
    for aim, point in ((at(now.time - half, index), middle), (middle, middle), (after, after)):
        estimate = yield _moved(schedule, x, now, aim, outputs[-1]), point
        outputs.append(schedule.output(estimate, point))
    return _moved(schedule, x, now, after, weighted((1 / 6, 1 / 3, 1 / 3, 1 / 6), outputs))


def _moved(schedule: Schedule, x: Latents, start: Point, end: Point, output: Latents) -> Latents:
    """Latents x of one point at another, if this is the model's output all along: formula (11)."""
    clean, noise = schedule.estimate(x, output, start)
    return end.alpha * clean + end.sigma * noise


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    warm_up = 0 if fields.skip_prk_steps else 3
    if steps <= warm_up:
        raise InvalidInput("steps", f"is {steps}, expected at least {warm_up + 1}: pndm begins with {warm_up} others")
    table = alphas_cumprod(fields)

    def at(time: float, step: int) -> Point:
        signal = float(table[int(time)])
        return Point(math.sqrt(signal), math.sqrt(1 - signal), time, step)

    schedule, ends = strided(fields, steps)
    stride = fields.num_train_timesteps // steps
    return Sampler(schedule, partial(pndm, ends=ends, at=at, stride=stride, warm_up=warm_up))


SOLVER = Solver(prepare)
