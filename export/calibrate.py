"""Calibration sets: run a checkpoint's float model on chosen requests, and write what its submodels got to one file.

What is finished is kept in the cache until the set is written, so a capture that was stopped goes on where it was.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import export.options
from calibration.data import Done, record
from calibration.requests import Requests, briefly, built_in, read_images, read_prompts, read_questions
from calibration.sets import CalibrationSet, Kind
from export.learned import floating_model
from export.progress import Listener, Progress, Report, Step
from export.source import check_finite
from export.staging import cache_folder, key_of
from export.state import Build, part_graph
from runtime.errors import InvalidInput, NotFound, SourceError


@dataclass(frozen=True)
class Options:
    """What to capture. `source` is as in a build; at most one of `prompts`, `images`, `questions` is given, else requests are built-in.

    `count` is the most requests to run, None what is usual for where they come from. Raises InvalidInput.
    """

    source: str
    output: Path
    prompts: Path | None = None
    images: Path | None = None
    questions: Path | None = None
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("prompts", "images", "questions") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidInput(given[1], f"cannot be given together with {given[0]}: capture one set of each")
        if self.count is not None and self.count < 1:
            raise InvalidInput("count", f"is {self.count}, expected 1 or more requests")
        if self.seed < 0:
            raise InvalidInput("seed", f"is {self.seed}, expected 0 or more")
        if self.output.exists() and not _is_set(self.output):
            raise InvalidInput("output", f"{self.output} exists and is no calibration set: choose another file")

    def requests(self, kind: Kind) -> Requests:
        """Where requests for this kind of model come from. Raises NotFound or InvalidInput."""
        if self.prompts:
            return read_prompts(self.prompts, kind, self.seed)
        if self.images:
            return read_images(self.images, kind, self.seed)
        if self.questions:
            return read_questions(self.questions, kind, self.seed)
        return built_in(kind, self.seed)


def _is_set(path: Path) -> bool:
    try:
        CalibrationSet.load(path)
    except (InvalidInput, NotFound, SourceError):
        return False
    return True


def calibrate(options: Options, listen: Listener = lambda report: None) -> CalibrationSet:
    """Capture a set and write it to `options.output`, replacing an older set there only when all is done.

    Raises InvalidInput, NotFound, SourceError, EngineError or ResourceExhausted.
    """
    state = Build.open(export.options.Options(options.source, options.output))
    kind: Kind = "diffusion" if state.family.pipeline == "diffusion" else "chat"
    requests = options.requests(kind)
    if state.brief:
        requests = briefly(requests)
    work = cache_folder() / f"calibrate-{key_of(state.fingerprint, requests.origin, requests.file, options.count, options.seed)}"
    steps = [step for step in state.steps() if step.stage in ("check", "trace")]
    total = len(steps) + requests.wanted(options.count)
    progress = Progress(steps, lambda report: listen(replace(report, total=total)))
    _prepare(state, progress)
    shutil.rmtree(work / "float", ignore_errors=True)  # left by a capture that was killed
    work.mkdir(parents=True, exist_ok=True)
    with floating_model(state, work) as model:
        found = record(model, requests, options.count, seed=options.seed, folder=work / "requests", listen=_Requests(listen, len(steps)))
    found.save(options.output)
    shutil.rmtree(work, ignore_errors=True)
    return found


def _prepare(state: Build, progress: Progress) -> None:
    """Check the weights and trace what was not traced before, as a build does."""
    with progress.step("weights", "check"):
        for checkpoint in state.checkpoints.values():
            check_finite(checkpoint.tensors)
    for part in state.parts:
        with progress.step(part.name, "trace"):
            part_graph(state, part)


class _Requests:
    """Reports requests as the steps that come after the first `before`. ETA is the mean of those run, for each that is left."""

    def __init__(self, listen: Listener, before: int) -> None:
        self.listen, self.before = listen, before
        self.seconds: list[float] = []

    def __call__(self, done: Done) -> None:
        if done.seconds is not None and not done.reused:
            self.seconds.append(done.seconds)
        left = done.total - done.number + (done.seconds is None)
        eta = left * fmean(self.seconds) if self.seconds else 0.0
        step = Step(done.name, "capture", 1.0)
        detail = "kept from before" if done.reused else ""
        self.listen(Report(self.before + done.number, self.before + done.total, step, eta, done.seconds, detail))
