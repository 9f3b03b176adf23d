"""The command of the toy task: numbers come back scaled."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from serving.cli.options import ModelOptions, with_model_options


@with_model_options
def scale(numbers: Annotated[list[float], typer.Argument(help="Numbers to scale.")], where: ModelOptions) -> None:
    """Scale numbers."""
    from runtime.tasks.scale import Scaled, ScaleRequest

    request = ScaleRequest(tuple(numbers))
    with where.session(request) as session, session.run(request, lambda events: events) as stream:
        for event in stream:
            if isinstance(event, Scaled):
                print(*event.numbers)


COMMAND: Final = scale
