"""Steps that a bundle keeps the denoiser in: tried, scored, and the fewest that are good enough.

Each schedule draws the same requests as the bundle does with every step. Those are cases of the checkpoint's exam that
are not held out, or general prompts where it has none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Final

from rich.table import Table

from calibration.observe.metrics import PEAK, psnr_db
from calibration.requests.exams import Case, Judged, exam_of
from calibration.requests.requests import LEAST_TRIES, TRIES
from calibration.requests.tasks.image import TASK as REQUESTS
from profiles.score import percent
from profiles.tasks.image import PictureExam, pictures
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.forecast import NONE, Plan, Stored
from runtime.errors import InvalidInput, QualityError
from runtime.placing.loading import LoadedModel
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture

EVERY: Final = (5, 4, 3, 2)
FIRST: Final = (2, 3, 4)
SEED: Final = 1
"""Of the requests that are drawn."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of one schedule: the calls of the denoiser for each, seconds of a picture, and percent right where an
    exam judges. `psnr` is the median over the pictures, in dB, beside those of every step.
    """

    forecast: str
    calls: int
    seconds: float
    right: float | None
    psnr: float
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Floors:
    """What a schedule must reach: a PSNR in dB, and at most `drop` points less in the exam than with every step."""

    psnr: float
    drop: float

    def met(self, drawn: Drawn, plain: Drawn) -> bool:
        lost = 0.0 if drawn.right is None or plain.right is None else plain.right - drawn.right
        return drawn.psnr >= self.psnr and lost <= self.drop


def cases_of(model: LoadedModel, count: int) -> list[Case]:
    """The requests to try. Without an exam every picture is right, and prompts that the model cannot read are left
    out.
    """
    fingerprint, config = model.bundle.manifest.source.fingerprint, DiffusionConfig.parse(model.bundle.manifest.config)
    exam = exam_of(fingerprint)
    if exam is not None:
        return list(exam.cases(count, SEED, held=False))
    general = islice(REQUESTS.general(SEED), max(TRIES * count, LEAST_TRIES))
    requests = (REQUESTS.fitted(config.dump(), replace(one, seed=number)) for number, one in enumerate(general))
    readable = (one for one in requests if _reads(model, one))
    return [Case(request, lambda picture: Judged(True, {})) for request in islice(readable, count)]


def _reads(model: LoadedModel, request: ImageRequest) -> bool:
    try:
        model.pipeline(request).close()
    except InvalidInput:
        return False
    return True


class Trial:
    """Draws cases with every step (`plain`), then with one schedule after the other."""

    def __init__(self, model: LoadedModel, cases: Sequence[Case], setting: PictureExam, sampler: str | None) -> None:
        self._model, self._cases, self._setting, self._sampler = model, cases, setting, sampler
        self._judged = exam_of(model.bundle.manifest.source.fingerprint) is not None
        self.config = DiffusionConfig.parse(model.bundle.manifest.config)
        self.plain = self._drawn(NONE, None)

    def candidates(self) -> list[str]:
        """Schedules by rule, as `ordered` has them."""
        return self.ordered([f"every {every} after {first}" for first, every in product(FIRST, EVERY)])

    def ordered(self, texts: Sequence[str]) -> list[str]:
        """Schedules that leave out steps, the fewest calls first; of several with the same steps the first. Raises
        InvalidInput naming `forecast`, or `steps` where there is none.
        """
        found: dict[frozenset[int], str] = {}
        for text in texts:
            found.setdefault(self._plan(self._request(self._cases[0].request, text)).left_out, text)
        if set(found) <= {frozenset()}:
            raise InvalidInput("steps", f"are {self._setting.steps}, of which {', '.join(texts)} leave out none")
        return [found[steps] for steps in sorted(found, key=len, reverse=True) if steps]

    def draw(self, forecast: str) -> Drawn:
        """Raises InvalidInput naming `forecast`."""
        return self._drawn(forecast, self.plain)

    def _plan(self, request: ImageRequest) -> Plan:
        return self.config.plan_of(request, self.config.sampler_of(request))

    def _request(self, request: ImageRequest, forecast: str) -> ImageRequest:
        made = self._setting.request(Case(request, lambda _: _))
        return replace(made, sampler=self._sampler, forecast=forecast)

    def _drawn(self, forecast: str, plain: Drawn | None) -> Drawn:
        cases = [Case(self._request(case.request, forecast), case.judge) for case in self._cases]
        setting = self._setting.model_copy(update={"forecast": forecast})
        calls = self.config.sampler_of(cases[0].request).calls - len(self._plan(cases[0].request).left_out)
        began = time.perf_counter()
        found = list(pictures(self._model, cases, setting))
        seconds = (time.perf_counter() - began) / len(cases)
        right = percent([case.judge(picture).right for case, picture in zip(cases, found, strict=True)])
        beside = found if plain is None else plain.pictures
        psnr = statistics.median(psnr_db(one, other, PEAK) for one, other in zip(beside, found, strict=True))
        return Drawn(forecast, calls, seconds, right if self._judged else None, psnr, found)

    def stored(self, drawn: Drawn) -> Stored:
        """The schedule as a bundle holds it."""
        figures = {"psnr_db": drawn.psnr, "pictures": float(len(self._cases)), "calls": float(drawn.calls)}
        if drawn.right is not None and self.plain.right is not None:
            figures |= {"right": drawn.right, "right_of_every_step": self.plain.right}
        sampler = self._sampler or self.config.sampler
        return Stored(forecast=drawn.forecast, sampler=sampler, steps=self._setting.steps, figures=figures)


def tried(trial: Trial, forecasts: Sequence[str], floors: Floors, told: Callable[[Drawn], None]) -> Iterator[Drawn]:
    """What each schedule draws, until one meets the floors."""
    for forecast in forecasts:
        drawn = trial.draw(forecast)
        told(drawn)
        yield drawn
        if floors.met(drawn, trial.plain):
            return


def chosen(trial: Trial, drawn: Sequence[Drawn], floors: Floors) -> Drawn:
    """The first that meets the floors. Raises QualityError where none does."""
    found = next((one for one in drawn if floors.met(one, trial.plain)), None)
    if found is None:
        best = max(drawn, key=lambda one: one.psnr)
        raise QualityError(
            f"no schedule meets the floors, {floors.psnr:g} dB and {floors.drop:g} points: '{best.forecast}' comes "
            f"nearest with {best.psnr:.1f} dB; nothing is stored. Try other steps with --try, or lower floors"
        )
    return found


def table(plain: Drawn, drawn: Sequence[Drawn]) -> Table:
    """A line for each schedule; time is beside every step."""
    shown = Table("forecast", "calls", "right", "PSNR, dB", "s a picture", "time")
    for one in (plain, *drawn):
        right = "-" if one.right is None else f"{one.right:.1f} %"
        psnr = "" if one is plain else f"{one.psnr:.1f}"
        share = f"{one.seconds / plain.seconds:.2f}"
        shown.add_row(one.forecast, str(one.calls), right, psnr, f"{one.seconds:.3g}", share)
    return shown
