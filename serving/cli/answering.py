"""Options of `chat` and `caption` that say how an answer is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, cast

import typer

from runtime.limits import SEED
from serving.cli.options import UINT32

if TYPE_CHECKING:
    from serving.dialects.python.requests import ChatOptions


@dataclass(frozen=True)
class Answering:
    """How tokens are chosen, and where an answer ends. None is the model's default."""

    max_tokens: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Longest answer, in tokens.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 = always the likeliest token.")] = None
    top_k: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Sample among the k likeliest tokens.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this joint probability.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens already seen become less likely.")
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=SEED.most, help="Seed of the sampling; the same one gives the same answer on the same engine."
        ),
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None
    beams: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Above 1: search for the likeliest of so many answers.")
    ] = None
    length_penalty: Annotated[
        float | None, typer.Option(help="With several beams: the larger, the longer the answers.")
    ] = None
    answers: Annotated[
        int | None,
        typer.Option(min=0, max=UINT32, help="Number of answers: the likeliest of the beams, or drawn ones."),
    ] = None
    context_overflow: Annotated[
        str | None,
        typer.Option(
            help="Where the context is full: refuse (the default), or slide, which leaves out the oldest turns without "
            "pictures."
        ),
    ] = None

    def given(self) -> ChatOptions:
        """The options of the request."""
        return cast("ChatOptions", asdict(self))
