"""The `enginecast` command. It starts fast: each command imports what it needs when it runs.

The commands in FORWARDS belong to the layers beside this one and are imported by name, on demand, so that a serving
machine needs neither their code nor their dependencies.
"""

from __future__ import annotations

import asyncio
import importlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from runtime import command
from runtime.errors import InvalidInput, MissingDependency
from serving.cli.options import (
    ADDRESS,
    DeviceName,
    MemoryLimit,
    PictureCache,
    PlaceText,
    Strict,
    Target,
    Threads,
    caching,
    engine_options,
    named,
    placement,
)
from serving.cli.task import task_commands

if TYPE_CHECKING:
    from runtime.bundle.manifest import Bundle
    from serving.host.job import Model

UNPARSED: Final = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
FORWARDS: Final = {
    "build": ("export.cli.commands", "Build a bundle from a checkpoint."),
    "calibrate": (
        "export.cli.commands",
        "Capture the inputs of a model's submodels while it works, to calibrate builds with.",
    ),
    "preprocess": ("export.cli.commands", "Make the picture of a control, such as the edges of a photograph."),
    "report": ("export.cli.commands", "Write the quality report of a quantized bundle as one page."),
    "inspect": ("export.cli.commands", "Show what a bundle holds."),
    "verify": ("export.cli.commands", "Compare a bundle's files with their hashes."),
    "add-target": ("export.cli.commands", "Compile a bundle for one more target or machine, from its own graphs."),
    "strip": ("export.cli.commands", "Leave out the canonical graphs and weights of a bundle."),
    "keygen": ("export.cli.commands", "Make a pair of keys to sign bundles with."),
    "sign": ("export.cli.commands", "Sign a bundle."),
    "targets": ("export.cli.commands", "Every target: whether it compiles here, whether it runs here, and why not."),
    "bench": ("profiles.cli", "Measure a bundle on this machine."),
    "score": ("profiles.cli", "Score bundles of the sample models on their task."),
}
"""Commands of the layers beside this one: where each is, and what help says of it."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def enginecast() -> None:
    """Cast diffusion and vision-language models into compiled engines, and serve them."""


@app.command()
def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]DIR...",
            help="Folders made by `enginecast build`. With a name, requests use that instead of the bundle's own: "
            "int8=DIR int4=DIR.",
        ),
    ],
    address: Annotated[
        str, typer.Option(help="HOST:PORT to listen on; port 0 takes a free one. There is no TLS: keep it private.")
    ] = ADDRESS,
    target: Target = None,
    device: DeviceName = "",
    place: PlaceText = None,
    memory_limit: MemoryLimit = None,
    strict: Strict = False,
    picture_cache: PictureCache = None,
    require_signature: Annotated[
        Path | None,
        typer.Option(metavar="PUBLIC_KEY", help="Serve only bundles signed with this key's private half (a PEM file)."),
    ] = None,
    threads: Threads = 0,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait per model.")] = 16,
    grace: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that running requests get to finish when the server stops.")
    ] = 30.0,
) -> None:
    """Serve bundles over gRPC until SIGINT or SIGTERM."""
    import logging

    from runtime import limits
    from runtime.bundle import signing
    from runtime.placing.loading import load_model
    from serving.dialects.grpc import server
    from serving.host.models import ModelHost
    from serving.host.offers import Limits, Offer

    options, placing = engine_options(device, threads), placement(place, memory_limit, strict)
    placing = caching(placing, picture_cache)

    limits.GRACE.number("grace", grace)  # typer lets NaN pass
    if require_signature is not None:
        signing.public_key(require_signature)  # a wrong key fails at once
    offers = [Offer.of(root, name) for name, root in map(named, bundles)]
    if all(offer.error for offer in offers):
        raise next(offer.error for offer in offers if offer.error)

    def load(bundle: Bundle | Path, requested: str | None) -> Model:
        return load_model(bundle, requested or target, options, placing, require_signature)

    async def run() -> None:
        host = ModelHost(offers, load, Limits(max_queue=max_queue, grace_seconds=grace))
        await server.serve(host, address, lambda line: print(line, flush=True))

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run())


for _command in task_commands():
    app.command()(_command)


@app.command()
def devices(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    bundle: Annotated[
        Path | None, typer.Option(help="Show where the submodels of this bundle would be loaded, and what they take.")
    ] = None,
    target: Target = None,
    device: DeviceName = "",
    place: PlaceText = None,
    memory_limit: MemoryLimit = None,
    address: Annotated[
        str | None, typer.Option(help="Show what the models of the server at HOST:PORT really run on.")
    ] = None,
) -> None:
    """Devices of this machine, their features and memory; every target, whether it can be used here, and why not."""
    from serving.cli import overview

    given = {"target": target, "device": device, "place": place, "memory_limit": memory_limit}
    for name in (name for name, value in given.items() if value and bundle is None):
        raise InvalidInput(name, "belongs to --bundle: it says where the submodels of one are loaded")
    overview.show(overview.collect(bundle, target, device, placement(place, memory_limit, False), address), as_json)


def _forward(context: typer.Context) -> None:
    """Run the command of the same name of another layer's typer app."""
    name = context.info_name or ""
    module, _ = FORWARDS[name]
    try:
        other: typer.Typer = importlib.import_module(module).app
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or module, "export") from None
    # get_group: an app of one command would otherwise take no command name
    typer.main.get_group(other)([name, *context.args], prog_name="enginecast")


for _name, (_, _help) in FORWARDS.items():
    app.command(_name, help=_help, context_settings=UNPARSED)(_forward)


def main() -> None:
    """The console script: a mistake of the user is one line on standard error and an exit code."""
    command.run(partial(app, prog_name="enginecast"))


if __name__ == "__main__":
    main()
