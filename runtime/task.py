"""A task is the kind of work that a caller requests, such as drawing pictures, independent of the algorithm that does
it. A bundle names both.

Each task is a file in `runtime/tasks/`, found by listing the folder, with its request, its defaults and the events of
its result. Other layers have a file with the same name in their own `tasks` folder, such as its messages over gRPC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import runtime.tasks
from runtime.errors import BundleError, did_you_mean, quoted
from runtime.listing import modules


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Base class of the requests of all tasks. `task` is the task's name. `scripts` are what changes the request or its
    result where it runs: installed scripts by name, the outermost one first, each with its arguments by name
    (`runtime.scripting`).
    """

    task: ClassVar[str]
    scripts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the files in the request, which are in memory while it waits."""
        return 0


@dataclass(frozen=True)
class Task:
    """A task: the class of its requests, and the verb that names its command and methods.

    A file in `runtime/tasks/` declares one as `TASK`.
    """

    request: type[Request]
    verb: str

    @property
    def name(self) -> str:
        return self.request.task


@cache
def tasks() -> dict[str, Task]:
    """Every task by name."""
    found = [module.TASK for module in modules(runtime.tasks)]
    return {task.name: task for task in found}


def task(name: str) -> Task:
    """The task with this name. Raises BundleError with the nearest name."""
    if name not in tasks():
        raise BundleError(f"the task {quoted(name)} is not known to this program: {did_you_mean(name, tasks())}")
    return tasks()[name]
