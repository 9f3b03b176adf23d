"""DPM-Solver++(2S), the single-step solver of second order (Lu et al. 2022, algorithm 1; arXiv 2211.01095). Equals
diffusers' DPMSolverSinglestepScheduler 0.42, which counts both evaluations of a step of second order as steps.
"""

from __future__ import annotations

from functools import partial

from runtime.diffusion.published import SchedulerFields
from runtime.diffusion.schedule import Latents, Point, Schedule
from runtime.diffusion.scheduling import preserving
from runtime.diffusion.solver import Noise, Options, Sampler, Solver, Steps
from runtime.diffusion.solvers.dpmpp_2m import extrapolated, step
from runtime.diffusion.spacing import USUAL


def dpmpp_2s(schedule: Schedule, x: Latents, fresh: Noise, lower_order_final: bool = True, heun: bool = False) -> Steps:
    """From every even point a step of first order to the odd one, then from the even one again a step of second order
    to the point after both.
    """
    low_end = lower_order_final or schedule.point(len(schedule)).sigma == 0
    begin: tuple[Latents, Latents, Point] | None = None
    for index in schedule.steps:
        now, after = schedule.point(index), schedule.point(index + 1)
        clean, _ = yield x, now
        if begin is None or index % 2 == 0 or (low_end and index == len(schedule) - 1):
            begin, x = (x, clean, now), step(x, now, after, clean)
            continue
        start, first, point = begin
        past = ((point.log_snr, first), (now.log_snr, clean))
        x = step(start, point, after, extrapolated(past, after.log_snr - point.log_snr, heun))
    return x


def prepare(fields: SchedulerFields, steps: int, options: Options) -> Sampler:
    """An odd number of steps ends with one of first order."""
    low_end, heun = fields.lower_order_final or steps % 2 == 1, fields.solver_type == "heun"
    return Sampler(preserving(fields, steps, options), partial(dpmpp_2s, lower_order_final=low_end, heun=heun))


SOLVER = Solver(prepare, USUAL)
