"""`enginecast grid`: a picture for each combination of up to three parameters' values, on one labelled page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from serving.cli.drawing import Added, Canvas, Conditions
from serving.cli.enlarging import Enlarging
from serving.cli.options import ModelOptions, with_fields, with_model_options
from serving.cli.plain import Plain

if TYPE_CHECKING:
    from runtime.grid.plan import GridPlan
    from runtime.vision.images import Picture
    from serving.dialects.python.grid import Kept
    from serving.dialects.python.session import Session

FOLDER: Final = ".cells"
"""Ending of the folder with the pictures of the cells."""
VALUES: Final = "FIELD=VALUES"


@with_model_options
@with_fields("conditions", Conditions)
@with_fields("enlarging", Enlarging)
@with_fields("canvas", Canvas)
@with_fields("added", Added)
@with_fields("plain", Plain)
def grid(
    prompt: Annotated[str, typer.Option(help="What to draw. May be empty.")],
    out: Annotated[
        Path, typer.Option(help="PNG file to write. The cells are kept in the folder NAME.cells beside it.")
    ],
    where: ModelOptions,
    plain: Plain,
    added: Added,
    canvas: Canvas,
    enlarging: Enlarging,
    conditions: Conditions,
    x: Annotated[
        str | None,
        typer.Option(
            "--x",
            metavar=VALUES,
            help="Columns, such as steps=10,20, steps=10-50:10, sampler=euler,ddim or "
            "prompt_sr=red,blue, which replaces red in the prompts.",
        ),
    ] = None,
    y: Annotated[str | None, typer.Option("--y", metavar=VALUES, help="Rows, likewise.")] = None,
    z: Annotated[str | None, typer.Option("--z", metavar=VALUES, help="Blocks of both, likewise.")] = None,
) -> None:
    """Draw a picture for each combination of values. Run again after an interruption, it goes on."""
    from runtime.grid.axes import Axis
    from runtime.grid.picture import grid_picture
    from runtime.grid.plan import GridPlan
    from serving.cli import terminal
    from serving.dialects.python.grid import GridDrawing, Kept, resumable
    from serving.dialects.python.requests import image_request

    terminal.check_output(out)
    parts = {
        **plain.given(),
        **added.given(),
        **canvas.given(),
        **enlarging.given(),
        **conditions.sizes(),
        **conditions.scores(),
    }
    request = image_request(terminal.unicode("prompt", prompt), parts | {"scripts": where.scripts()})
    texts = {name: terminal.unicode(name, text) for name, text in (("x", x), ("y", y), ("z", z)) if text is not None}
    plan = GridPlan(resumable(request), {name: Axis.parse(name, text) for name, text in texts.items()})
    with where.session(plan.cells[0]) as session:
        kept = Kept(out.with_name(f"{out.stem}{FOLDER}"), session.identity)
        found = tuple(_drawn(session, plan, kept))
    GridDrawing(plan, grid_picture(plan, found), found).save(out)
    print(out)


def _drawn(session: Session, plan: GridPlan, kept: Kept) -> Iterator[Picture]:
    """The pictures of the cells, with a bar that shows how many there are."""
    from serving.cli import terminal
    from serving.dialects.python.grid import cells

    total = len(plan.cells)
    before = sum(kept.file(request).is_file() for request in plan.cells)
    if before:
        terminal.errors.print(f"{before} of {total} cells are in {kept.folder}", markup=False, soft_wrap=True)
    with terminal.counting("drawing cells", total) as advance:
        for picture in cells(plan, session.draw, kept):
            advance()
            yield picture


COMMAND: Final = grid
