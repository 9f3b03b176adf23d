"""Options of `chat` and `caption` that say how an answer is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

import typer

from runtime.errors import InvalidInput, NotFound
from runtime.files import read_regular
from runtime.limits import GRAMMAR, SEED
from serving.cli.options import UINT32

if TYPE_CHECKING:
    from runtime.language.grammar import Grammar
    from serving.dialects.python.requests import ChatOptions

GRAMMAR_BYTES: Final = 4 * GRAMMAR.most
"""As many as the characters of the longest schema may have."""


@dataclass(frozen=True)
class Answering:
    """How tokens are chosen, and where an answer ends. None is the model's default."""

    max_tokens: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Longest answer, in tokens.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 = always the likeliest token.")] = None
    top_k: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Sample among the k likeliest tokens.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this joint probability.")
    ] = None
    min_p: Annotated[
        float | None, typer.Option(help="Leave out tokens below this share of the likeliest one's probability.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens already seen become less likely.")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Above 0: tokens become less likely each time that they are in the answer.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: tokens that are in the answer become less likely.")
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
    format: Annotated[
        str | None,
        typer.Option(
            metavar="json|FILE", help="Answer with a JSON object, or with a value of the JSON schema in a file."
        ),
    ] = None
    regex: Annotated[str | None, typer.Option(help="Answer with a text that this regular expression matches.")] = None
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0, max=UINT32, help="Show how likely each token was, and so many of the likeliest in its place."
        ),
    ] = None
    lookup_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, max=UINT32, help="Guess so many tokens at a time from what is repeated: the same answer, sooner."
        ),
    ] = None
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, max=UINT32, help="Guess so many tokens at a time by the model's draft: the same answer, sooner."
        ),
    ] = None
    prediction: Annotated[
        str | None, typer.Option(help="A text that the answer repeats in great part: the same answer, sooner.")
    ] = None
    picture_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, max=UINT32, help="Read so many positions of each picture, the least alike: sooner, with less detail."
        ),
    ] = None
    context_overflow: Annotated[
        str | None,
        typer.Option(
            help="Where the context is full: refuse (the default), or slide, which leaves out the oldest turns without "
            "pictures."
        ),
    ] = None

    def given(self) -> ChatOptions:
        """The options of the request. Raises InvalidInput and NotFound for a form that cannot be read."""
        options = asdict(self)
        return cast("ChatOptions", options | {"grammar": _grammar(options.pop("format"), options.pop("regex"))})


def _grammar(form: str | None, regex: str | None) -> Grammar | None:
    from runtime.language.grammar import Grammar

    if form is None:
        return None if regex is None else Grammar.regex(regex)
    if regex is not None:
        raise InvalidInput("regex", "does not go with --format: send one of them")
    if form == "json":
        return Grammar.json()
    try:
        return Grammar.schema(read_regular(Path(form), GRAMMAR_BYTES).decode())
    except OSError as error:
        raise NotFound(f"schema {form} cannot be read: {error.strerror} (--format is json, or such a file)") from None
    except UnicodeDecodeError:
        raise InvalidInput("format", f"{form} is no text in UTF-8") from None
