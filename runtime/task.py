"""What a task is: the work that a caller requests, whatever algorithm does it. A bundle names both.

One file per task in `runtime/tasks/`, found by listing the folder: its request, its defaults and the events of its
result. What depends on the task elsewhere, such as its messages over gRPC, lies in a file of the same name in the
`tasks` folder of that layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import runtime.tasks
from runtime.errors import BundleError, did_you_mean, quoted
from runtime.listing import modules


class Request:
    """What a caller wants done: base of every task's request. `task` is the task's name."""

    task: ClassVar[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the files that it holds while it waits."""
        return 0


@dataclass(frozen=True)
class Task:
    """A task: the class of its requests, and the verb that its commands and methods are named by.

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
    """The task of that name. Raises BundleError with the nearest name."""
    if name not in tasks():
        raise BundleError(f"the task {quoted(name)} is not known to this program: {did_you_mean(name, tasks())}")
    return tasks()[name]
