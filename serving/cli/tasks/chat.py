"""`enginecast chat`: questions about pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from serving.cli.answering import Answering
from serving.cli.options import ModelOptions, with_fields, with_model_options

if TYPE_CHECKING:
    from serving.dialects.python.requests import Message


@with_model_options
@with_fields("answering", Answering)
def chat(
    where: ModelOptions,
    answering: Answering,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to talk about; may be repeated.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask. Without it: a conversation; /help lists its commands.")
    ] = None,
) -> None:
    """Ask about pictures, once or in a conversation."""
    from serving.cli import terminal
    from serving.cli.conversation import Conversation, typed
    from serving.dialects.python.requests import chat_request

    pictures = [terminal.read_image(path) for path in image or ()]
    given = answering.given()
    first = chat_request(terminal.unicode("prompt", prompt or "?"), pictures, given)
    with where.session(first) as session:

        def answer(messages: Sequence[Message]) -> str:
            return terminal.speak(session.chat_stream(messages, **given), where.verbose)

        talk = Conversation(pictures, answer)
        if prompt is not None:
            talk.ask(prompt)
            return
        if sys.stdin.isatty():
            terminal.errors.print(
                f"Ask {where.model or where.bundle}. /help lists commands, Ctrl-D ends.", markup=False
            )
        talk.run(typed(), patient=sys.stdin.isatty())


COMMAND: Final = chat
