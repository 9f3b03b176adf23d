"""The command of each task. One file per task in `serving/cli/tasks/`, found by listing the folder.

Such a file declares its command as COMMAND: a function for typer, named by the task's verb.
"""

from __future__ import annotations

from collections.abc import Callable

import serving.cli.tasks
from runtime.listing import modules


def task_commands() -> list[Callable[..., None]]:
    """The commands of all tasks."""
    return [module.COMMAND for module in modules(serving.cli.tasks)]
