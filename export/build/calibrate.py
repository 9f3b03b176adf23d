"""Calibration sets: run a checkpoint's float model on chosen requests, and write what its submodels got to one file.

What is finished is kept in the cache until the set is written, so a capture that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import export.build.options
from calibration.capture.data import Done, record
from calibration.capture.sets import CalibrationSet
from calibration.requests.requests import briefly
from export.build.learned import floating_model
from export.build.options import CaptureOptions as Options
from export.build.staging import cache_folder, key_of
from export.build.state import Build, part_graph
from export.build.steps import reading
from export.report.progress import Listener, Progress, ProgressStep
from runtime.errors import ResourceExhausted
from runtime.files import vanishing


def calibrate(options: Options, listen: Listener = lambda report: None) -> CalibrationSet:
    """Capture a set and write it to `options.output`, replacing an older set there only when all is done.

    Raises InvalidInput, NotFound, SourceError, EngineError or ResourceExhausted.
    """
    options.check()
    chosen = export.build.options.Options(
        options.source,
        options.output,
        variant=options.variant,
        config=options.config,
        additions=options.additions,
    )
    state = Build.open(chosen)
    requests = options.requests(state.task, state.fingerprint)
    if state.brief:
        requests = briefly(requests)
    work = (
        cache_folder()
        / f"calibrate-{key_of(state.fingerprint, requests.origin, requests.file, options.count, options.seed)}"
    )
    steps = [step for step in reading(state) if step.stage != "parity"]
    progress = Progress(
        [*steps, ProgressStep("pipeline", "capture", state.capturing(requests.wanted(options.count)))], listen
    )
    with _scratch(work, options.output) as scratch:
        _prepare(state, progress)
        with progress.step("pipeline", "capture") as notes, floating_model(state, scratch) as model:
            found = record(
                model, requests, options.count, seed=options.seed, folder=work / "requests", listen=_Reused(notes)
            )
        found.save(options.output)
    shutil.rmtree(work, ignore_errors=True)
    return found


@contextmanager
def _scratch(work: Path, output: Path) -> Iterator[Path]:
    """A folder that vanishes however the capture ends, with all that it leaves half written. Raises
    ResourceExhausted.
    """
    unfinished = f"*.{os.getpid()}", f"*.{os.getpid()}.*"
    try:
        (work / "requests").mkdir(parents=True, exist_ok=True)
        folders = dict.fromkeys((work.parent, work / "requests", output.absolute().parent))
        scratch = vanishing(work, "float-", *(str(folder / name) for folder in folders for name in unfinished))
    except OSError as error:
        raise ResourceExhausted(
            f"cannot write the cache {work.parent}: {error.strerror}. Set ENGINECAST_CACHE to another folder"
        ) from None
    with scratch as folder:
        yield folder


def _prepare(state: Build, progress: Progress) -> None:
    """Check the weights and trace what was not traced before, as a build does."""
    with progress.step("weights", "check"):
        state.check_weights()
    for part in state.parts:
        with progress.step(part.name, "trace"):
            part_graph(state, part)


class _Reused:
    """Counts the requests that an earlier capture had done, into the notes of the step."""

    def __init__(self, notes: list[str]) -> None:
        self._notes, self._count = notes, 0

    def __call__(self, done: Done) -> None:
        if done.seconds is not None:
            self._count += done.reused
            self._notes[:] = [f"{done.number} requests"] + [f"{self._count} kept from before"] * bool(self._count)
