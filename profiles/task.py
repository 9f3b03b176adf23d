"""What is measured of the models of a task. One file per task in `profiles/tasks/`, found by listing the folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import profiles.tasks
from runtime.listing import modules
from runtime.placing.loading import LoadedModel
from runtime.task import Request

if TYPE_CHECKING:
    from profiles.probes import Probe, ProbeSettings


@dataclass(frozen=True)
class ProfileTask:
    """What is measured of the models of one task. A file in `profiles/tasks/` declares one as `TASK`.

    `does` is a verb for messages, as in "a model that draws". `options` are the options of `bench` and `score` that
    apply to such models alone. Submodels are measured with the calls that `request` makes; `probes` are those of the
    whole model. Both raise InvalidInput where the model refuses the settings.
    """

    task: str
    does: str
    options: frozenset[str]
    request: Callable[[ProbeSettings], Request]
    probes: Callable[[LoadedModel, ProbeSettings], list[Probe]]


@cache
def profile_tasks() -> dict[str, ProfileTask]:
    """Every task that is measured, by name."""
    found = [module.TASK for module in modules(profiles.tasks)]
    return {task.task: task for task in found}
