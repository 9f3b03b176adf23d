"""`enginecast chat`: questions about pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from serving.cli.answering import Answering
from serving.cli.options import ModelOptions, ShownPictures, with_fields, with_model_options


@with_model_options
@with_fields("answering", Answering)
def chat(
    where: ModelOptions,
    answering: Answering,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to talk about; may be repeated.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask. Without it: a conversation; /help lists its commands.")
    ] = None,
    pictures: ShownPictures = "auto",
) -> None:
    """Ask about pictures, once or in a conversation."""
    from serving.cli import terminal
    from serving.cli.repl.about import about
    from serving.cli.repl.lines import piped
    from serving.cli.repl.loop import Screen
    from serving.cli.repl.settings import Settings
    from serving.cli.repl.tasks.chat import Talk, Talking
    from serving.dialects.python.requests import chat_request

    shown = [terminal.read_image(path) for path in image or ()]
    first = chat_request(terminal.unicode("prompt", prompt or "?"), shown, answering.given())
    settings = Settings(Screen(where.verbose, pictures=pictures), answering, Talking())
    with where.session(first) as session:
        talk = Talk(session, where.model or where.bundle or "", about(where), settings)
        talk.pictures = shown
        if prompt is not None:
            talk.ask([prompt])
        elif sys.stdin.isatty():
            talk.begin()
        else:
            talk.run(piped(), patient=False)


COMMAND: Final = chat
