"""The `enginecast` command. It starts fast: each command imports what it needs when it runs.

The commands in FORWARDS belong to the layers beside this one and are imported by name, on demand, so that a serving
machine needs neither their code nor their dependencies.
"""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from runtime import command
from runtime.errors import InvalidInput, MissingDependency
from serving.cli import models, tokens
from serving.cli.options import (
    ADDRESS,
    ConnectionOptions,
    DeviceName,
    MemoryLimit,
    PlaceText,
    Target,
    placement,
    with_connection,
    with_fields,
)
from serving.cli.run import run
from serving.cli.task import task_commands
from serving.settings import CONFIG, Settings, configure, names

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
    "tune": ("profiles.tune", "Measure quickly what is fastest on this machine: target, threads, calls at once."),
    "forecast": ("profiles.cli", "Choose the steps in which a bundle runs its UNet, and store them in it."),
    "score": ("profiles.cli", "Score bundles of the sample models on their task."),
}
"""Commands of the layers beside this one: where each is, and what help says of it."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def enginecast() -> None:
    """Cast diffusion and vision-language models into compiled engines, and serve them."""


@app.command()
@with_fields("flags", Settings)
def serve(
    context: typer.Context,
    flags: Settings,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", envvar=CONFIG, help="TOML file of settings, by the names that --print-config has."
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every setting and where its value came from, and end.")
    ] = False,
) -> None:
    """Serve bundles over gRPC until SIGINT or SIGTERM. Every option may also be in a file or in the environment."""
    configuration = configure(_given(context, flags), config, os.environ)
    if print_config:
        print(configuration.toml(), end="")
        return
    from serving.cli.start import start

    start(configuration.settings)


def _given(context: typer.Context, flags: Settings) -> dict[str, Any]:
    """The settings that the command line has."""
    sources = {name: context.get_parameter_source(name) for name in names()}
    return {name: getattr(flags, name) for name, source in sources.items() if source and source.name == "COMMANDLINE"}


app.add_typer(tokens.app, name="token")
for _command in (*task_commands(), run):
    app.command()(_command)


app.add_typer(models.app, name="models")


@app.command()
@with_connection
def devices(
    connection: ConnectionOptions,
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
    from serving.dialects.grpc.connection import Connection

    given = {"target": target, "device": device, "place": place, "memory_limit": memory_limit}
    for name in (name for name, value in given.items() if value and bundle is None):
        raise InvalidInput(name, "belongs to --bundle: it says where the submodels of one are loaded")
    overview.show(
        overview.collect(
            bundle,
            target,
            device,
            placement(place, memory_limit, False),
            address,
            Connection(**connection.connection()),
        ),
        as_json,
    )


@app.command()
@with_connection
def scripts(
    connection: ConnectionOptions,
    address: Annotated[
        str | None, typer.Option(help="Show the scripts of the server at HOST:PORT. Default: those installed here.")
    ] = None,
) -> None:
    """Scripts that requests may name, with their arguments."""
    from runtime.scripting import Scripts
    from serving.cli import scripting
    from serving.dialects.grpc.messages import script_info
    from serving.dialects.python.client import Client

    if address is None:
        found = [script_info(one) for one in Scripts().listed()]
    else:
        with Client(address, **connection.connection()) as client:
            found = client.installed_scripts()
    for line in scripting.lines(found):
        print(line)


@app.command()
@with_connection
def top(
    connection: ConnectionOptions,
    address: Annotated[str, typer.Option(help="Server to watch, HOST:PORT.")] = ADDRESS,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Watch a server in the terminal: its models, their states, queues, speed and memory. Key q ends it."""
    import sys

    from runtime.optional import require
    from serving.dialects.grpc.client import Client
    from serving.dialects.grpc.connection import Connection

    require("textual", "top")
    if not sys.stdout.isatty():
        raise InvalidInput("top", "needs a terminal; `enginecast devices --address` prints a server's models once")
    from serving.cli.top import PATIENCE, Top

    with Client(address, Connection(**connection.connection())) as client:
        Top(address, partial(client.status, PATIENCE), interval).run()


@app.command()
@with_connection
def health(
    connection: ConnectionOptions,
    service: Annotated[
        str, typer.Argument(help="A model's name, or a service such as enginecast.v1.ModelService; none is the server.")
    ] = "",
    address: Annotated[str, typer.Option(help="Server to check, HOST:PORT.")] = ADDRESS,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds that the answer may take.")] = 5.0,
) -> None:
    """Check a server, for probes: the exit code is 0 if it serves, 1 if it answers that it does not."""
    from serving.dialects.grpc.client import Client
    from serving.dialects.grpc.connection import Connection

    with Client(address, Connection(**connection.connection(), attempts=1)) as client:
        serves = client.serves(service, timeout)
    print("serving" if serves else "not serving")
    raise typer.Exit(0 if serves else 1)


@app.command()
@with_connection
def ui(
    connection: ConnectionOptions,
    bundles: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]DIR...", help="Bundles to serve in this process, with the page."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help=f"Server whose models the page offers, HOST:PORT. Without bundles: {ADDRESS}.")
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the page is; port 0 takes a free one.")
    ] = "127.0.0.1:7860",
) -> None:
    """Serve a web page to draw, talk about pictures and manage models, until SIGINT or SIGTERM (extras ui and http)."""
    from serving.cli import ui

    if bundles:
        given = {"address": address, **connection.connection()}
        for name in (name for name, value in given.items() if value):
            raise InvalidInput(name, "belongs to a server elsewhere: name either it, or bundles")
        ui.beside(bundles, listen)
    else:
        ui.alone(address or ADDRESS, listen, connection.connection())


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
