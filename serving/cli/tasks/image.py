"""`enginecast generate`: pictures from a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from serving.cli.drawing import Added, Canvas, Conditions, Refining
from serving.cli.enlarging import Enlarging
from serving.cli.options import UINT32, ModelOptions, with_fields, with_model_options
from serving.cli.plain import Plain

if TYPE_CHECKING:
    from runtime.tasks.image import ImageRequest
    from serving.dialects.python.results import Drawing


@with_model_options
@with_fields("conditions", Conditions)
@with_fields("refining", Refining)
@with_fields("enlarging", Enlarging)
@with_fields("canvas", Canvas)
@with_fields("added", Added)
@with_fields("plain", Plain)
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw. May be empty.")],
    out: Annotated[
        Path, typer.Option(help="PNG file to write; of several pictures, NAME-0.png, NAME-1.png and so on.")
    ],
    where: ModelOptions,
    plain: Plain,
    added: Added,
    canvas: Canvas,
    enlarging: Enlarging,
    refining: Refining,
    conditions: Conditions,
    images: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Number of pictures.")] = None,
) -> None:
    """Draw a picture from a prompt."""
    from serving.cli import terminal
    from serving.dialects.python.requests import image_request

    terminal.check_output(out)
    refined, scores = refining.refiner is not None, conditions.scores()
    parts = {
        **plain.given(),
        **added.given(),
        **canvas.given(),
        **enlarging.given(),
        **conditions.sizes(),
        **({} if refined else scores),
    }
    given = {**parts, "images": images, "denoising_end": refining.handover()}
    request = image_request(terminal.unicode("prompt", prompt), given)
    for path in _drawn(request, where, refining, scores).save(out):
        print(path)


def _drawn(request: ImageRequest, where: ModelOptions, refining: Refining, scores: dict[str, Any]) -> Drawing:
    """What the model draws, and the refiner from it, which takes these scores."""
    from serving.cli import terminal
    from serving.dialects.python.requests import going_on

    stages = [where] if refining.refiner is None else [where, where.of(refining.refiner)]
    for later in stages[1:]:
        later.check(request)
    drawing = None
    for stage in stages:
        request = request if drawing is None else going_on(request, drawing, **scores)
        with stage.session(request) as session:
            drawing = terminal.draw(session.draw(request), where.verbose)
    assert drawing is not None, "there is a stage"
    return drawing


COMMAND: Final = generate
