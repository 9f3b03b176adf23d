"""The options of commands that read a checkpoint for what is added to it: one for each kind of addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from export.checkpoint.additions import KINDS, parse_all
from runtime.command import spread

T = TypeVar("T")


def with_additions(command: Callable[..., T]) -> Callable[..., T]:
    """A command whose parameter `additions` is a tuple of them: on the command line, each kind is an option."""
    options = {
        name: (
            Annotated[
                list[str] | None,
                typer.Option(metavar=kind.metavar, help=f"{kind.help} Repeat for several."),
            ],
            None,
        )
        for name, kind in KINDS.items()
    }
    return spread(command, "additions", options, lambda **texts: parse_all(texts))
