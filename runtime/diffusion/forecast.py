"""Steps without the denoiser: its output is continued from those of the steps before.

What is continued are the clean latents that the outputs imply, as a function of the log of signal over noise: along a
line through the last two, with half its slope. Liu et al. 2025 (TaylorSeer, arXiv 2503.06923) continue features by
Taylor's series; here it is the output, and decision 44 says what was measured. Which steps keep the denoiser is a text:
"every 3 after 2", or a list such as "1-3,6,9,12". Steps are counted from 1, as progress is.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import Field

from runtime import limits
from runtime.bundle.manifest import Frozen
from runtime.diffusion.schedule import Latents
from runtime.diffusion.solver import Sampler, Walk
from runtime.errors import InvalidInput, quoted

FIELD: Final = "forecast"
NONE: Final = "none"
STORED: Final = "stored"
RULE: Final = re.compile(r"every (\d{1,4}) after (\d{1,4})", re.ASCII)
PART: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)
EXPECTED: Final = '"none", "stored", "every K after N" such as "every 3 after 2", or steps such as "1-3,6,9,12"'
POINTS: Final = 2
"""Outputs that the next is continued from."""
SLOPE: Final = np.float32(0.5)
"""How much of the line's slope is followed. With all of it, solvers that extrapolate themselves become unstable."""


class Stored(Frozen):
    """The steps of a bundle that were chosen by scoring pictures (`enginecast forecast`): `forecast` as a request says
    it, and the sampler and the number of steps that it was chosen with. `figures` are what was measured.
    """

    forecast: str = Field(max_length=limits.FORECAST.most)
    sampler: str
    steps: int = Field(ge=1, le=limits.STEPS.most)
    figures: Mapping[str, float] = Field(default_factory=dict)

    def check(self, sampler: str, steps: int) -> None:
        """Raises InvalidInput naming `forecast` where a picture is drawn otherwise than it was chosen for."""
        if (sampler, steps) != (self.sampler, self.steps):
            raise InvalidInput(
                FIELD, f"stored is of {self.steps} steps of {self.sampler}, and these are {steps} of {sampler}: draw "
                f'so, or request "{self.forecast}" itself'
            )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The steps, from 0, in which the denoiser is left out of `steps` that are taken."""

    steps: int
    left_out: frozenset[int] = frozenset()

    @classmethod
    def read(cls, text: str, name: str, sampler: Sampler) -> Plan:
        """That of a text, for the sampler of this name. Raises InvalidInput naming `forecast`."""
        steps = len(sampler.schedule.steps)
        computed = _computed(text, steps)
        plan = cls(steps, frozenset(range(steps)) - computed)
        twice = {step for step, count in Counter(sampler.evaluated).items() if count > 1}
        if wrong := sorted(plan.left_out & twice):
            raise InvalidInput(
                FIELD, f"leaves out step {wrong[0] + 1}, in which {name} evaluates the model more than once: use a "
                "sampler that does so once in a step, such as dpmpp_2m"
            )  # fmt: skip
        return plan


def _computed(text: str, steps: int) -> frozenset[int]:
    """The steps, from 0, that a text keeps. Raises InvalidInput naming `forecast`."""
    limits.FORECAST.length(FIELD, text)
    if text == NONE or not steps:
        return frozenset(range(steps))
    if (rule := RULE.fullmatch(text)) is not None:
        every, first = int(rule[1]), int(rule[2])
        if every and first:
            return frozenset({*range(min(first, steps)), *range(first - 1, steps, every), steps - 1})
        raise InvalidInput(FIELD, f"is {quoted(text)}, expected numbers of at least 1: the first step has the denoiser")
    found: set[int] = set()
    for part in text.split(","):
        span = PART.fullmatch(part.strip())
        if span is None:
            raise InvalidInput(FIELD, f"is {quoted(text)}, expected {EXPECTED}")
        found.update(range(int(span[1]), int(span[2] or span[1]) + 1))
    if wrong := sorted(step for step in found if not 1 <= step <= steps):
        raise InvalidInput(FIELD, f"names step {wrong[0]}, expected 1 to {steps}, those that are taken")
    if 1 not in found:
        raise InvalidInput(FIELD, f"is {quoted(text)}, which leaves out step 1: nothing comes before it")
    return frozenset(step - 1 for step in found)


class Forecast:
    """What the denoiser gave in one picture's steps so far, by the row of the batch: with guidance in a part of the
    steps, the negative prompt's row has less. `left_out` counts the calls that were left out.
    """

    def __init__(self, plan: Plan) -> None:
        self.left_out = 0
        self._plan = plan
        self._rows: dict[int, deque[tuple[float, Latents]]] = {}

    def output(self, walk: Walk, rows: int) -> Latents | None:
        """The output [rows, ...] to go on with. None where the denoiser is to be called: in the steps of the plan, and
        where a row has nothing to go on from.
        """
        if walk.step not in self._plan.left_out or not all(self._rows.get(row) for row in _places(rows)):
            return None
        self.left_out += 1
        clean = [_continued(self._rows[row], walk.point.log_snr) for row in _places(rows)]
        return walk.output(np.concatenate(clean))

    def add(self, walk: Walk, output: Latents) -> None:
        """What the denoiser gave for the present latents, [rows, ...]."""
        if not self._plan.left_out:
            return
        clean, place = walk.clean(output), walk.point.log_snr
        for row in _places(len(output)):
            past = self._rows.setdefault(row, deque(maxlen=POINTS))
            if past and past[-1][0] == place:  # a second evaluation at the same point
                past.pop()
            past.append((place, clean[[row]]))


def _places(rows: int) -> range:
    """The places of so many rows, from the end of a batch: the last is the prompt's."""
    return range(-rows, 0)


def _continued(past: deque[tuple[float, Latents]], place: float) -> Latents:
    """What is expected at a place behind the last two, or the last one where there is no other."""
    if len(past) < POINTS:
        return past[-1][1]
    (before, first), (after, second) = past
    return second + SLOPE * np.float32((place - after) / (after - before)) * (second - first)
