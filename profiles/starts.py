"""How long a model takes to load: cold, as the first time on a machine, and warm, as each time after.

Cold: the bundle's files are not in memory, where the system lets them be dropped from it, and the cache of what is
compiled and timed once is empty. Warm: the next process with the same cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from profiles.bench import Say, labelled, of_one_run, worker_of
from profiles.protocol import Hello
from profiles.rows import Row
from profiles.worker import Job
from runtime.bundle.manifest import Bundle
from runtime.files import CACHE

COLD: Final = "load_cold"
WARM: Final = "load_warm"


def starts(job: Job, repeat: int, say: Say) -> list[Row]:
    """A row for cold loads and one for warm ones, so many of each. Raises EngineError."""
    bundle = Bundle(job.bundle)
    found = list(_pairs(job.model_copy(update={"purpose": "start"}), bundle, repeat))
    rows = []
    for metric, hellos in ((COLD, [cold for cold, _ in found]), (WARM, [warm for _, warm in found])):
        rows.append(labelled(bundle, hellos[0], metric, "s", [hello["load"] for hello in hellos]))
        say(f"{metric} on {hellos[0]['target']}: {rows[-1].spread.median:.4g} s")
    return of_one_run(rows)


def _pairs(job: Job, bundle: Bundle, repeat: int) -> Iterator[tuple[Hello, Hello]]:
    for _ in range(repeat):
        with TemporaryDirectory() as cache:
            forget(bundle.root)
            first, second = (_started(job, cache) for _ in range(2))
            yield first, second


def _started(job: Job, cache: str) -> Hello:
    with worker_of(job, {CACHE: cache}) as worker:
        return worker.hello


def forget(folder: Path) -> None:
    """Drop a folder's files from the memory in which the system keeps them. Does nothing where it has no such call."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
