"""`enginecast run`: a model by its name, whatever its task, asked once or at the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.cli.options import ModelOptions, ShownPictures, with_fields


@with_fields("where", ModelOptions, without=("model", "bundle"))
def run(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A model of the server, the folder of a bundle, or a bundle of --repository."
        ),
    ],
    where: ModelOptions,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]", help="What to ask or to draw. Without it: a conversation.")
    ] = None,
    repository: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of bundles, one of which is called NAME.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting, such as steps=20, as /set has it. Repeatable."),
    ] = None,
    pictures: ShownPictures = "auto",
) -> None:
    """Ask a model or let it draw: once with a PROMPT or where text is piped in, else line by line at the terminal."""
    from serving.cli.repl import opening
    from serving.cli.repl.loop import Screen

    screen = Screen(where.verbose, pictures=pictures)
    opening.run(
        opening.found(name, where, repository), screen, setting or (), None if prompt is None else " ".join(prompt)
    )
