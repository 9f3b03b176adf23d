"""`enginecast forecast`: chooses the steps in which a bundle keeps its denoiser, and stores them in it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from runtime.bundle.manifest import SIGNATURE, Bundle
from runtime.errors import InvalidInput, MissingDependency
from runtime.tasks.image import ImageRequest

FLOOR: Final = 35.0
"""What Apple's conversion of Stable Diffusion asks of a converted model, in dB."""
MOST_DROP: Final = 1.0
"""Points of the exam's score."""
Floor = Annotated[float, typer.Option(min=0, help="Least PSNR to the pictures of every step, a median in dB.")]
Drop = Annotated[float, typer.Option(min=0, help="Most points of the exam's score that may be lost.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps of a picture. Default: the model's.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Classifier-free guidance. Default: the model's.")]
Try = Annotated[
    list[str] | None,
    typer.Option(
        "--try",
        metavar="STEPS",
        help='Steps to try, such as "1,2,4,6,9,12"; repeat for several. Default: rules, such as "every 5 after 2", the '
        "fewest calls first.",
    ),
]


def forecast(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle, which is changed.")],
    target: Annotated[str | None, typer.Option(help="Engine to draw with. Default: the first that runs here.")] = None,
    floor: Floor = FLOOR,
    drop: Drop = MOST_DROP,
    attempts: Try = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each schedule.")] = 32,
    steps: Steps = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler by name. Default: the model's.")] = None,
    guidance_scale: Guidance = None,
    batch: Annotated[int | None, typer.Option(min=1, max=32, help="Pictures drawn together. Default: 16.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads per engine, 0 = all cores.")] = 0,
    key: Annotated[
        Path | None, typer.Option(metavar="PRIVATE", help="Of a signed bundle: sign it anew with this key.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Of a signed bundle: drop its signature.")] = False,
) -> None:
    """Choose the steps in which a bundle runs its UNet, the fewest that are good enough, and store them in it."""
    try:
        from export.finished.artifacts import Signed
        from export.finished.settings import store_config
        from profiles import forecasts
    except ImportError as error:
        raise MissingDependency(error.name or "onnx_ir", "export") from None
    from profiles.tasks.image import exam_settings
    from runtime.engine import Options
    from runtime.placing.loading import load_model

    out, notes = (Console(highlight=False, soft_wrap=True, stderr=error) for error in (False, True))
    opened = Bundle(bundle)
    if opened.manifest.task != ImageRequest.task:
        raise InvalidInput("BUNDLE", f"is a model of the task {opened.manifest.task}, expected one that draws")
    Signed(key, force).check(opened)
    setting = exam_settings(None, [bundle], count, {"steps": steps, "guidance_scale": guidance_scale, "batch": batch})
    floors, dropped = forecasts.Floors(floor, drop), (bundle / SIGNATURE).exists() and key is None
    model = load_model(bundle, target, Options(threads=threads))
    try:
        trial = forecasts.Trial(model, forecasts.cases_of(model, count), setting, sampler)

        def told(drawn: forecasts.Drawn) -> None:
            notes.print(f"{drawn.forecast}: {drawn.calls} calls, {drawn.psnr:.1f} dB", markup=False)

        steps_of = trial.ordered(attempts) if attempts else trial.candidates()
        tried = list(forecasts.tried(trial, steps_of, floors, told))
    finally:
        model.close()
    out.print(forecasts.table(trial.plain, tried))
    chosen = forecasts.chosen(trial, tried, floors)
    stored = trial.stored(chosen).model_dump(mode="json")
    store_config(bundle, {"forecast": stored}, Signed(key, force))
    out.print(f"{bundle}: stored, draw with --forecast stored: {shlex.quote(chosen.forecast)}", markup=False)
    if dropped:
        notes.print(f"warning: {bundle} is no longer signed", markup=False)
