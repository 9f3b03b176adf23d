"""`enginecast run NAME`: which model a name means, and what to do with it at the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import serving.cli.repl.tasks
from runtime.bundle.manifest import MANIFEST
from runtime.errors import InvalidInput, NotFound, did_you_mean, quoted
from runtime.listing import modules
from runtime.placing.variants import variants
from runtime.task import task
from serving.cli import terminal
from serving.cli.options import ModelOptions
from serving.cli.repl.about import about, task_of
from serving.cli.repl.loop import Repl, Screen
from serving.cli.repl.settings import Settings
from serving.host.offers import Offer
from serving.host.repository import Repository


@cache
def repls() -> dict[str, type[Repl]]:
    """What takes lines for the models of each task, by the task's name."""
    return {module.REPL.task: module.REPL for module in modules(serving.cli.repl.tasks)}


def run(where: ModelOptions, screen: Screen, given: Sequence[str], prompt: str | None) -> None:
    """Do what a prompt asks of a model, or take lines for it. `given` are settings, NAME=VALUE each. Raises
    InvalidInput for a model of a task without prompts, and the errors of requests.
    """
    kind = task_of(where)
    if kind not in repls():
        raise InvalidInput("NAME", f"has the task {kind}, which takes no lines: use `enginecast {task(kind).verb}`")
    repl = repls()[kind]
    settings = Settings(screen, *repl.options())
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput("--set", f"is {quoted(text)}, expected NAME=VALUE")
        settings = settings.set(name, terminal.unicode(name, value))
    with where.session(repl.request(settings)) as session:
        repl(session, _label(where), about(where), settings).begin(prompt)


def found(name: str, where: ModelOptions, repository: Path | None) -> ModelOptions:
    """Where the model of this name runs: the bundle of a repository, the bundle of a folder, a model of a server.
    Raises NotFound, BundleError, and InvalidInput for an address with a folder.
    """
    if not name:
        raise InvalidInput("NAME", "is empty, expected a model of a server or the folder of a bundle")
    folder = _folder(name, where, repository)
    if folder is None:
        return replace(where, model=name)
    if where.address is not None:
        raise InvalidInput("address", f"is that of a server, and {folder} a folder: leave one of them out")
    return replace(where, bundle=str(folder.absolute()))


def _folder(name: str, where: ModelOptions, repository: Path | None) -> Path | None:
    """The folder that a name means, None where it means a model of a server."""
    if repository is not None:
        return _in_repository(name, repository)
    if any(sign in name for sign in ("/", os.sep)) or name in (".", "..", "~"):
        return terminal.path("NAME", name)
    bundle = where.address is None and bool((Path(name) / MANIFEST).is_file() or variants(Path(name)))
    return Path(name) if bundle else None


def _in_repository(name: str, root: Path) -> Path:
    """The folder of a model's bundle; of several versions the highest. Raises NotFound."""
    offers: dict[str, Offer] = {}
    for offer in Repository(root).look().offers:  # the highest versions first
        offers.setdefault(offer.model, offer)
        offers[offer.name] = offer
    if name not in offers:
        raise NotFound(f"the repository {root} has no bundle {quoted(name)}: {did_you_mean(name, offers)}")
    return offers[name].root


def _label(where: ModelOptions) -> str:
    """The name of the model, for the eye and for files."""
    return where.model if where.bundle is None else where.opened(where.bundle).name
