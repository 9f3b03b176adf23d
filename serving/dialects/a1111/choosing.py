"""Which model a call is for."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from runtime.diffusion.defaults import ImageAbilities
from runtime.errors import InvalidInput, did_you_mean
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from serving.dialects.a1111.fields import Options
from serving.host.models import ModelHost
from serving.host.states import ModelState, Status

SHORT: Final = 10
"""Letters of a hash as the web UI shows it, behind a name in brackets."""
HASH: Final = re.compile(r" \[[0-9a-f]+\]$")


def models(host: ModelHost, task: str) -> list[Status]:
    """The models with this task, those first that are loaded."""
    found = [status for status in host.statuses() if status.task == task]
    return sorted(found, key=lambda status: status.state is not ModelState.READY)


def checkpoint(host: ModelHost, options: Options) -> Status:
    """The model that draws for a client with these options. Raises InvalidInput naming the option."""
    return _named(host, ImageRequest.task, options.sd_model_checkpoint or "", "sd_model_checkpoint")


def answering(host: ModelHost, name: str) -> Status:
    """The chat model of this name, or the first one. Raises InvalidInput naming `model`."""
    return _named(host, ChatRequest.task, name, "model")


def _named(host: ModelHost, task: str, name: str, field: str) -> Status:
    known = models(host, task)
    if not known:
        raise InvalidInput(field, f"cannot be chosen: this server has no model with the task {task}")
    name = HASH.sub("", name)
    if not name:
        return known[0]
    if (found := next((status for status in known if status.name == name), None)) is None:
        raise InvalidInput(field, f"'{name}' is not known: {did_you_mean(name, [status.name for status in known])}")
    return found


def refining(host: ModelHost, name: str) -> Status:
    """The model that goes on where another one ends. Raises InvalidInput naming `refiner_checkpoint`."""
    return _named(host, ImageRequest.task, name, "refiner_checkpoint")


def digest(host: ModelHost, name: str) -> str | None:
    """The sha256 of a model's bundle: of its manifest, which has those of all its files. None without a bundle."""
    bundle = host.catalog.find(name).offer.bundle
    return None if bundle is None else hashlib.sha256(bundle.content).hexdigest()


def abilities(status: Status) -> ImageAbilities | None:
    """What a model draws, None where that is not known before it is loaded."""
    return ImageAbilities.of(status.abilities)
