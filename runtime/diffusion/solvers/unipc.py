"""UniPC: a predictor and a corrector of one order, the corrector without an evaluation of its own (Zhao et al. 2023,
algorithms 5 to 8; arXiv 2302.04867). Equals diffusers' UniPCMultistepScheduler 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Point, Schedule
from runtime.diffusion.scheduling import preserving
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.spacing import USUAL

Past = Sequence[tuple[float, Latents]]
"""The log of signal over noise at the last points, the newest first, and the estimates of the clean latents there."""


def unipc(
    schedule: Schedule, x: Latents, fresh: Noise, most: int = 2, bh1: bool = False, lower_order_final: bool = True
) -> Steps:
    """Predict the next point's latents from the last `most` estimates, and correct them once there is the estimate at
    that point.
    """
    past: Past = ()
    order, start, before = 0, x, schedule.point(schedule.first)
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        if past:
            x = _update(start, before, now, past[:order], bh1, clean)
        past = ((now.log_snr, clean), *past[: most - 1])
        left = len(schedule) - index if lower_order_final else most
        moves = now.log_snr < after.log_snr < math.inf  # else ratios to this step are undefined
        order, start, before = min(len(past), left) if moves else 1, x, now
        x = _update(x, now, after, past[:order], bh1)
    return x


def _update(x: Latents, now: Point, after: Point, past: Past, bh1: bool, ahead: Latents | None = None) -> Latents:
    """From one point to the other, with the estimates before and, where it is there, the one at the end (`ahead`)."""
    (start, clean), *older = past
    h = after.log_snr - now.log_snr
    ratios = [(point - start) / h for point, _ in older]
    differences = [(found - clean) / ratio for ratio, (_, found) in zip(ratios, older, strict=True)]
    if ahead is not None:
        ratios, differences = [*ratios, 1.0], [*differences, ahead - clean]
    target = clean
    gain = -math.expm1(-h)
    for weight, difference in zip(_weights(ratios, h, h if bh1 else gain), differences, strict=True):
        target = target + weight * difference
    return after.sigma / now.sigma * x + after.alpha * gain * target


def _weights(ratios: Sequence[float], h: float, scale: float) -> list[float]:
    """What the differences count beside the newest estimate: theorem 3.1, with B(h) the `scale`."""
    gain = -math.expm1(-h)
    if len(ratios) < 2:
        return [0.5 * scale / gain for _ in ratios]
    phi, factorial, right = 1 - gain / h, 1, []
    for power in range(1, len(ratios) + 1):
        right.append(phi * factorial / scale)
        factorial *= power + 1
        phi = 1 / factorial - phi / h
    matrix = np.array([[ratio**power for ratio in ratios] for power in range(len(ratios))])
    return [float(weight) * scale / gain for weight in np.linalg.solve(matrix, np.array(right))]


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    solve = partial(
        unipc,
        most=fields.solver_order,
        bh1=fields.solver_type == "bh1",
        lower_order_final=fields.lower_order_final,
    )
    return Sampler(preserving(fields, steps, options), solve)


SOLVER = Solver(prepare, USUAL)
