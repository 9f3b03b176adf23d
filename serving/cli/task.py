"""The commands that send requests to a model. One file per command in `serving/cli/tasks/`, found by listing the
folder.

Such a file declares its command as COMMAND: a function for typer. Every task has one, named by its verb; others send
requests of one of the tasks, such as `caption`.
"""

from __future__ import annotations

from collections.abc import Callable

import serving.cli.tasks
from runtime.listing import modules


def task_commands() -> list[Callable[..., None]]:
    """The commands of all tasks."""
    return [module.COMMAND for module in modules(serving.cli.tasks)]
