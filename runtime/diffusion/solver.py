"""What a solver is: a generator that walks latents along a schedule, one file each in `runtime/diffusion/solvers/`.

    def euler(schedule, x, fresh):
        for index in schedule.steps:
            now, after = schedule.point(index), schedule.point(index + 1)
            estimate = yield x, now
            x = ...
        return x

It yields latents and their point of the schedule, and is sent the model's `Estimate` of them. The latents that it
yields are arrays of its own: where a part of a picture is kept, their values are changed before the model is evaluated.
It may evaluate the model several times in a step, and keep earlier estimates. It never calls a model: `Walk` does, for
a pipeline. It takes the steps of `schedule.steps`, which may begin in the middle of the schedule. A file declares one
`Solver` under the name SOLVER and is found by listing the folder; its name is the sampler's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

import runtime.diffusion.solvers
from runtime.diffusion.published import SchedulerConfig, SchedulerFields
from runtime.diffusion.schedule import Estimate, Latents, Point, Schedule
from runtime.diffusion.spacing import SPACINGS
from runtime.errors import InvalidInput, did_you_mean
from runtime.listing import modules

Noise = Callable[[], Latents]
"""Draws fresh standard normal noise of the latents' shape."""
Keep = Callable[[Latents, Point | None], Latents]
"""Puts what is kept of a picture into latents of a point; None is behind the last step."""
Steps = Generator[tuple[Latents, Point], Estimate, Latents]


@dataclass(frozen=True)
class Options:
    """How a request varies a solver: how noise levels are spaced (one of `SPACINGS`, or "" for those of the timesteps),
    how much fresh noise (0 to 1) is added, and the share of the training's timesteps that all steps lie in, from the
    least noise on.
    """

    spacing: str = ""
    eta: float = 0.0
    share: float = 1.0


@dataclass(frozen=True)
class Sampler:
    """A solver with the schedule that it walks along. `solve` takes the schedule, the latents that it starts from and
    the source of fresh noise.
    """

    schedule: Schedule
    solve: Callable[[Schedule, Latents, Noise], Steps]

    @cached_property
    def evaluated(self) -> tuple[int, ...]:
        """The step, from 0, of every evaluation of the model in a walk: one or two in a step."""
        zeros = np.zeros((1, 1, 1, 1), np.float32)
        walk, steps = Walk(self, zeros, lambda: zeros), []
        while walk.latents is None:
            steps.append(walk.step)
            walk.advance(zeros)
        return tuple(steps)

    @property
    def calls(self) -> int:
        """How often a walk evaluates the model."""
        return len(self.evaluated)

    def strengthened(self, strength: float) -> Sampler:
        """The last steps alone, as many as the share `strength`, 0 to 1, of all, rounded down: those that image to
        image takes. Equals `get_timesteps` of diffusers' StableDiffusionImg2ImgPipeline.

        Raises InvalidInput naming `strength` where a strength above 0 leaves no step.
        """
        steps = len(self.schedule)
        taken = min(int(steps * strength), steps)
        if strength and not taken:
            raise InvalidInput(
                "strength", f"is {strength:g}, which is less than one of {steps} steps: take more steps, or at least "
                f"{1 / steps:.2g}; 0 keeps the picture"
            )  # fmt: skip
        return self.last(taken)

    def last(self, taken: int) -> Sampler:
        """The last steps alone, so many."""
        return replace(self, schedule=replace(self.schedule, first=len(self.schedule) - taken))

    def between(self, start: float, end: float, trained: int) -> Sampler:
        """The steps of a part of the training's timesteps, `trained` in number, from the share `start` to the share
        `end`, 0 to 1: those that diffusers' pipelines of Stable Diffusion XL take with denoising_start and
        denoising_end.

        It begins with the latents that `handed_over` gives at the end of the part before. Raises InvalidInput naming
        `denoising_end` or `denoising_start` where there is no such step.
        """
        schedule = self.schedule
        first, last = (int((schedule.time >= round(trained - share * trained)).sum()) for share in (start, end))
        if first >= last:
            raise InvalidInput(
                "denoising_start" if start else "denoising_end", f"leaves none of {len(schedule)} steps: take more"
            )
        begin = schedule.scale(schedule.point(first)) if start else schedule.start
        return replace(self, schedule=replace(schedule, first=first, end=last, start=begin))

    def handed_over(self, latents: Latents) -> Latents:
        """The result of a walk as another model begins with it, whatever its schedule is: as models are trained on."""
        schedule = self.schedule
        if schedule.steps.stop == len(schedule):
            return latents
        return schedule.model_input(latents, schedule.point(schedule.steps.stop))


@dataclass(frozen=True)
class Solver:
    """How a solver's samplers are made from a published scheduler file, a number of steps and options.

    `spacings`, `eta` and `share` say which options it has. `prepare` raises InvalidInput where file and steps do not
    fit.
    """

    prepare: Callable[[SchedulerFields, int, Options], Sampler]
    spacings: Sequence[str] = ()
    eta: bool = False
    share: bool = False


@cache
def solvers() -> dict[str, Solver]:
    """Every solver by name: the files in `runtime/diffusion/solvers/`."""
    return {module.__name__.rpartition(".")[2]: module.SOLVER for module in modules(runtime.diffusion.solvers)}


def samplers() -> tuple[str, ...]:
    """The name of every sampler: a solver's, and with each spacing that it has, such as "euler_karras"."""
    return tuple(
        name + ending
        for name, solver in solvers().items()
        for ending in ("", *(f"_{spacing}" for spacing in solver.spacings))
    )


def make_sampler(name: str, config: SchedulerConfig, steps: int, eta: float = 0.0, share: float = 1.0) -> Sampler:
    """The sampler of that name (one of `samplers()`) over `steps` steps. `eta` 0 to 1 is how much fresh noise DDIM and
    TCD add. `share` above 0 is of image to image with models that take all steps in it, as `Options.share`; solvers
    without that option take the last steps alone.

    Raises InvalidInput naming `sampler`, `steps`, `eta` or `scheduler` when the name is unknown, the steps do not fit
    the model's schedule, eta is given to a sampler that has none, or the schedule has a value that this sampler cannot
    take.
    """
    known, spacing = _named(name)
    solver, fields = solvers()[known], config.read_for(known)
    if not 1 <= steps <= fields.num_train_timesteps:
        raise InvalidInput(
            "steps", f"is {steps}, expected 1 to {fields.num_train_timesteps}, the timesteps the model was trained on"
        )
    if not 0 <= eta <= 1:
        raise InvalidInput("eta", f"is {eta}, expected 0 to 1")
    if eta and not solver.eta:
        able = " and ".join(other for other, found in solvers().items() if found.eta)
        raise InvalidInput("eta", f"is {eta}, but only {able} have it: leave it 0 for {name}")
    found = solver.prepare(fields, steps, Options(spacing, eta, share))
    return found if solver.share else found.strengthened(share)


def _named(name: str) -> tuple[str, str]:
    """The names of a sampler's solver and spacing. Raises InvalidInput naming `sampler`."""
    solver, _, spacing = name.rpartition("_")
    if name in solvers():
        return name, ""
    if name in samplers():
        return solver, spacing
    if spacing in SPACINGS and solver in solvers():
        able = ", ".join(f"_{ending}" for ending in solvers()[solver].spacings)
        raise InvalidInput(
            "sampler", f"{solver} has no spacing '{spacing}': use {solver} {f'with {able}' if able else 'as it is'}"
        )
    endings = ", ".join(f"_{ending}" for ending in SPACINGS)
    raise InvalidInput("sampler", f"'{name}' is not known: {did_you_mean(name, solvers())}, some also with {endings}")


class Walk:
    """A sampler at work, from standard normal `noise`, float32 [batch, channels, height, width], or from latents
    `clean` of that shape, to which the noise of the first step is added. `keep` is called with the latents that the
    model is evaluated on after the first time, and with the result.

    The model is to be evaluated on `x` at `time`, and its output given to `advance`, until `latents` holds the result:
    at once where the schedule has no step to take. `calls` counts the evaluations done, `step` the steps: a step is
    done when the solver goes on to a later point of its schedule.
    """

    def __init__(
        self, sampler: Sampler, noise: Latents, fresh: Noise, clean: Latents | None = None, keep: Keep | None = None
    ) -> None:
        self.latents: Latents | None = None
        self.calls = 0
        self._keep = keep
        self._schedule = schedule = sampler.schedule
        start = noise * np.float32(schedule.start) if clean is None else schedule.noised(clean, noise)
        self._solver = sampler.solve(schedule, start, fresh)
        self._send(None)

    @property
    def x(self) -> Latents:
        """The latents as the model was trained on them."""
        return self._schedule.model_input(self._x, self._point)

    @property
    def time(self) -> float:
        """The timestep that the model receives."""
        return self._point.time

    @property
    def point(self) -> Point:
        """The point of the schedule that the model is evaluated at."""
        return self._point

    def clean(self, output: Latents) -> Latents:
        """The clean latents that an output implies for the present latents; of each row, where it has several."""
        return self._schedule.estimate(self._x, output, self._point).clean

    def output(self, clean: Latents) -> Latents:
        """The output that implies these clean latents: the reverse of `clean`, where nothing was clipped."""
        noise: Latents = self._x - self._point.alpha * clean
        return self._schedule.output(Estimate(clean, noise / self._point.sigma), self._point)

    @property
    def step(self) -> int:
        return (self._schedule.steps.stop if self.latents is not None else self._point.step) - self._schedule.first

    def advance(self, output: Latents) -> Latents:
        """Go on to the next evaluation. The result is the estimate of the clean latents, which a preview shows."""
        estimate = self._schedule.estimate(self._x, output, self._point)
        self.calls += 1
        self._send(estimate)
        return estimate.clean

    def _send(self, estimate: Estimate | None) -> None:
        """Run the solver to its next evaluation, or to its end. None starts it."""
        try:
            self._x, self._point = self._solver.send(estimate)  # type: ignore[arg-type]
        except StopIteration as end:
            self.latents = self._kept(end.value, None) if estimate else end.value
        else:
            if estimate:
                self._x[...] = self._kept(self._x, self._point)

    def _kept(self, x: Latents, point: Point | None) -> Latents:
        return x if self._keep is None else self._keep(x, point)
