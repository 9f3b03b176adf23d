"""`enginecast embed`: vectors of texts and pictures, or how well they match."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from serving.cli.options import ModelOptions, with_model_options


@with_model_options
def embed(
    where: ModelOptions,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be repeated.")] = None,
    match: Annotated[
        Literal["itc", "itm"] | None,
        typer.Option(
            help="Compare every picture with every text: itc by their embeddings, itm by a network that reads both."
        ),
    ] = None,
) -> None:
    """Print embeddings, a line of JSON each: {"text": TEXT, "embedding": [...]}, then {"image": PATH, "embedding":
    [...]}. With --match print a line for every picture with every text: score, path and text, with tabs between.
    """
    from serving.cli import terminal
    from serving.dialects.python.requests import embed_request

    pictures = [terminal.read_image(path) for path in image or ()]
    texts = [terminal.unicode("text", one) for one in text or ()]
    request = embed_request(texts, pictures, match)
    with where.session(request) as session:
        if match:
            scored = session.score(request).result()
            terminal.scores(scored, [str(path) for path in image or ()], texts, where.verbose)
        else:
            vectors = session.vectors(request).result()
            terminal.vectors(vectors, [str(path) for path in image or ()], texts, where.verbose)


COMMAND: Final = embed
