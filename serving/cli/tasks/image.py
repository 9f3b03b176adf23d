"""`enginecast generate`: pictures from a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from runtime.limits import IMAGE_SEED
from serving.cli.drawing import Added, Canvas, Conditions, Refining
from serving.cli.options import UINT32, ModelOptions, with_fields, with_model_options

if TYPE_CHECKING:
    from runtime.tasks.image import ImageRequest
    from serving.dialects.python.results import Drawing

PromptWeights = Annotated[
    bool,
    typer.Option(
        "--prompt-weights",
        help="Read (word:1.3) in prompts as a weight, and prompts longer than the text encoder reads at once, as "
        "Automatic1111's web UI does.",
    ),
]


@with_model_options
@with_fields("conditions", Conditions)
@with_fields("refining", Refining)
@with_fields("canvas", Canvas)
@with_fields("added", Added)
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw. May be empty.")],
    out: Annotated[
        Path, typer.Option(help="PNG file to write; of several pictures, NAME-0.png, NAME-1.png and so on.")
    ],
    where: ModelOptions,
    added: Added,
    canvas: Canvas,
    refining: Refining,
    conditions: Conditions,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Denoising steps.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=IMAGE_SEED.most,
            help="Seed of the noise, of further pictures 1 more each; the same one draws the same picture on the same "
            "engine.",
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler by name, such as euler.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's eta, 0 to 1.")] = None,
    width: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Height in pixels.")] = None,
    images: Annotated[int | None, typer.Option(min=0, max=UINT32, help="Number of pictures.")] = None,
    prompt_weights: PromptWeights = False,
) -> None:
    """Draw a picture from a prompt."""
    from serving.cli import terminal
    from serving.dialects.python.requests import ImageOptions, image_request

    terminal.check_output(out)
    plain = ImageOptions(
        negative_prompt=None if negative_prompt is None else terminal.unicode("negative_prompt", negative_prompt),
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        eta=eta,
        seed=seed,
        images=images,
        prompt_weights=prompt_weights or None,
        denoising_end=refining.handover(),
    )
    refined, scores = refining.refiner is not None, conditions.scores()
    given = {**plain, **added.given(), **canvas.given(), **conditions.sizes(), **({} if refined else scores)}
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
