"""`enginecast chat`: questions about pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from runtime.limits import SEED
from serving.cli.options import UINT32, ModelOptions, with_model_options

if TYPE_CHECKING:
    from serving.dialects.python.requests import Message


@with_model_options
def chat(
    where: ModelOptions,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to talk about; may be repeated.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask. Without it: a conversation; /help lists its commands.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = always the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this joint probability.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens already seen become less likely.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=SEED.most, help="Seed of the sampling; the same one gives the same answer on the same engine."
        ),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    beams: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Above 1: search for the likeliest of so many answers.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="With several beams: the larger, the longer the answers.")
    ] = None,
    context_overflow: Annotated[
        str | None,
        typer.Option(
            help="Where the context is full: refuse (the default), or slide, which leaves out the oldest turns without "
            "pictures."
        ),
    ] = None,
) -> None:
    """Ask about pictures, once or in a conversation."""
    from serving.cli import terminal
    from serving.cli.conversation import Conversation, typed
    from serving.dialects.python.requests import ChatOptions, chat_request

    pictures = [terminal.read_image(path) for path in image or ()]
    given = ChatOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        beams=beams,
        length_penalty=length_penalty,
        context_overflow=context_overflow,
    )
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
