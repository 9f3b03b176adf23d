"""Options of several commands, each declared once. Every command imports this file, so it imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_type_hints

import typer

from runtime import limits
from runtime.command import spread
from runtime.errors import InvalidInput

if TYPE_CHECKING:
    from runtime.bundle.manifest import Bundle
    from runtime.engine import Options
    from runtime.placing.placement import PlacementOptions
    from runtime.task import Request
    from serving.dialects.python.session import Session

UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
"""Seconds of the units of time."""
ADDRESS: Final = "127.0.0.1:50051"
UINT32: Final = 2**32 - 1

Target = Annotated[str | None, typer.Option(help="Engine to run on, such as openvino. Default: the best usable one.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads per engine, 0 = all cores.")]
DeviceName = Annotated[
    str, typer.Option("--device", help="Device to run on, such as cpu, cuda:1, GPU.0 or HETERO:GPU,CPU.")
]
PlaceText = Annotated[
    str | None,
    typer.Option(
        "--place",
        help="Where submodels run, by name or role: SUBMODEL=TARGET[:DEVICE] or SUBMODEL=DEVICE, such as "
        "text_encoder=cpu,unet=cuda:0.",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help="Memory that a model may take on each device, such as 4GiB: submodels take turns, pictures come in tiles."
    ),
]
PictureCache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for the features of pictures and texts seen before, per model: they are not encoded again. 0 holds"
        " none. Default: 128MiB.",
    ),
]
PrefixCache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for what chat models have read before, per model: a conversation that goes on, or begins as "
        "another did, is not read again. 0 holds none. Default: 1GiB; 0 with --memory-limit, beside which there can be "
        "none.",
    ),
]
TIMES: Final = "such as 90 (seconds), 5m, 0 or endless"
"""What `parse_keep_alive` reads, for help."""
KeepAlive = Annotated[
    str | None,
    typer.Option(metavar="TIME", help=f"How long the model stays loaded on the server if nobody uses it, {TIMES}."),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--no-strict", help="Refuse engines that run a part of a submodel elsewhere than on its device."
    ),
]

Way = Literal["auto", "never", "kitty", "iterm", "sixel", "blocks"]
"""How pictures are shown in a terminal."""
ShownPictures = Annotated[
    Way,
    typer.Option(
        "--pictures",
        help="How pictures are shown in the terminal: auto (what it can), never, by the protocol of kitty or iterm, as "
        "sixels, or as blocks of two pixels.",
    ),
]


@dataclass(frozen=True)
class ConnectionOptions:
    """Options of every command that connects to a server. Each may also be in the environment."""

    ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="ENGINECAST_CA",
            help="PEM file of the authority that the server's certificate must be of. Switches TLS on.",
        ),
    ] = None
    cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", envvar="ENGINECAST_CERT", help="PEM file of your certificate, where a server requires one."
        ),
    ] = None
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="ENGINECAST_KEY", help="PEM file of its private key.")
    ] = None
    token: Annotated[
        str | None,
        typer.Option(
            envvar="ENGINECAST_TOKEN",
            show_envvar=True,
            help="Bearer token. Other users of this machine see arguments: prefer the variable.",
        ),
    ] = field(default=None, repr=False)
    tls: Annotated[
        bool, typer.Option("--tls", envvar="ENGINECAST_TLS", help="Connect with TLS, trusting the public authorities.")
    ] = False

    def connection(self) -> dict[str, Any]:
        """These options, by the names of `enginecast.Client`."""
        return {field.name: getattr(self, field.name) for field in fields(ConnectionOptions)}


@dataclass(frozen=True)
class ModelOptions(ConnectionOptions):
    """Options of every command that sends requests to a model: which model, where it runs, what is printed."""

    model: Annotated[
        str, typer.Option("--model", help="Name of the model, as the server lists it. Not needed with --bundle.")
    ] = ""
    address: Annotated[str | None, typer.Option(help=f"Server to ask, HOST:PORT. Without --bundle: {ADDRESS}.")] = None
    bundle: Annotated[
        str | None,
        typer.Option(
            "--bundle",
            metavar="[NAME=]DIR",
            help="Run this bundle in process, without a server, under a name of your own.",
        ),
    ] = None
    target: Target = None
    device: DeviceName = ""
    place: PlaceText = None
    memory_limit: MemoryLimit = None
    strict: Strict = False
    threads: Threads = 0
    script: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:ARGUMENT=VALUE]",
            help="Script to run it with, and an argument of it. Repeat for further arguments and scripts; the first "
            "one is the outermost.",
        ),
    ] = None
    wildcards: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of text files for the script wildcards.")
    ] = None
    styles: Annotated[Path | None, typer.Option(metavar="FILE", help="File styles.csv for the script styles.")] = None
    keep_alive: KeepAlive = None
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what each submodel ran on, in what numbers, and how long.")
    ] = False

    @contextmanager
    def session(self, request: Request) -> Iterator[Session]:
        """Where requests go: a server, or a bundle in this process. `request` is the first one, or one like it, which
        is checked before a bundle is loaded. Raises InvalidInput where options exclude each other.
        """
        scripts = self.scripts()
        with closing(self._open(replace(request, scripts=request.scripts or scripts))) as opened:
            opened.scripts = scripts
            yield opened

    def scripts(self) -> dict[str, dict[str, Any]]:
        """The scripts by name, each with its arguments. Raises InvalidInput."""
        from serving.cli.scripting import parse_scripts

        return parse_scripts(self.script or ())

    def of(self, name: str) -> ModelOptions:
        """The same for another model: a bundle, or one of the server."""
        return replace(self, model=name) if self.bundle is None else replace(self, model="", bundle=name)

    def check(self, request: Request) -> None:
        """Raise NotFound, BundleError or InvalidInput where the bundle has another task than the request."""
        if self.bundle is not None:
            from serving.dialects.python.model import check_task

            check_task(self.opened(self.bundle).manifest.task, request)

    def opened(self, text: str) -> Bundle:
        """The bundle that a text [NAME=]DIR names; of a folder with several, the one that these options load. Raises
        NotFound, BundleError and InvalidInput.
        """
        from runtime.placing.variants import chosen

        return chosen(named(text)[1], self.target, placement(self.place, self.memory_limit, self.strict)).bundle

    def _open(self, request: Request) -> Session:
        options = engine_options(self.device, self.threads)
        placing = placement(self.place, self.memory_limit, self.strict)
        keep_alive = parse_keep_alive(self.keep_alive)
        if self.bundle is None:
            self._check_server()
            from serving.dialects.python.client import Client

            return Client(self.address or ADDRESS, self.model, keep_alive=keep_alive, **self.connection())
        self._check_bundle()
        name, root = named(self.bundle)
        if self.model not in ("", name):
            raise InvalidInput("model", "and --bundle exclude each other: a bundle holds one model")
        if self.address is not None:
            raise InvalidInput(
                "address", "and --bundle exclude each other: send requests to a server, or run the bundle in process"
            )
        from runtime.script import Folders
        from runtime.scripting import Scripts
        from serving.dialects.python.model import open_for

        return open_for(root, request, self.target, options, placing, Scripts(Folders(self.wildcards, self.styles)))

    def _check_bundle(self) -> None:
        """Raises InvalidInput for an option on a server that the command line has beside --bundle. What the environment
        has is for all commands, and of use to those that connect.
        """
        for name in ("keep_alive", *(one.name for one in fields(ConnectionOptions))):
            value, variable = getattr(self, name), os.environ.get(f"ENGINECAST_{name.upper()}", "")
            if value and (not variable if value is True else str(value) != variable):
                raise InvalidInput(name, "and --bundle exclude each other: it is loaded here, for this command alone")

    def _check_server(self) -> None:
        """Raises InvalidInput for an option on how a bundle runs, which only the server itself can be given."""
        for name in ("target", "device", "place", "memory_limit", "strict", "threads", "wildcards", "styles"):
            if getattr(self, name):
                option = name.replace("_", "-")
                raise InvalidInput(
                    name, f"belongs to --bundle: what runs on a server is chosen by `enginecast serve --{option}`"
                )


def with_fields(
    name: str, options: type[Any], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command whose parameter `name` is a dataclass of `options`: on the command line, its fields are
    options, except for those `without`, which have their defaults.
    """
    hints = get_type_hints(options, include_extras=True)
    spreading = {one.name: (hints[one.name], one.default) for one in fields(options) if one.name not in without}
    return lambda command: spread(command, name, spreading, options)


with_connection: Final = with_fields("connection", ConnectionOptions)
"""Decorates a command whose parameter `connection` is a `ConnectionOptions`."""
with_model_options: Final = with_fields("where", ModelOptions)
"""Decorates a command whose parameter `where` is a `ModelOptions`."""


def named(text: str) -> tuple[str, Path]:
    """The name and the folder of `NAME=DIR`; no name for a folder alone. A folder with "=" in its name is written as
    ./a=b.
    """
    name, equals, folder = text.partition("=")
    if not equals or "/" in name or os.sep in name:
        return "", Path(text)
    if not name or not folder:
        raise InvalidInput("bundle", f"is '{text}', expected DIR or NAME=DIR")
    return name, Path(folder)


def parse_keep_alive(text: str | None) -> float | None:
    """Seconds of a time such as 90, 5m, 1h or endless, which is -1. Raises InvalidInput."""
    if text is None:
        return None
    if text.strip() in ("endless", "-1"):
        return -1.0
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s*([smhd]?)", text.strip(), re.ASCII)
    if found is None:
        raise InvalidInput("keep_alive", f"is '{text}', expected a time such as 90, 5m or 1h, or 'endless'")
    seconds = float(found[1]) * UNITS[found[2]]
    limits.KEEP_ALIVE.number("keep_alive", seconds)
    return seconds


def engine_options(device: str, threads: int) -> Options:
    from runtime.engine import Options

    return Options(device=device, threads=threads)


def placement(place: str | None, memory_limit: str | None, strict: bool) -> PlacementOptions:
    from serving.dialects.python.model import placement

    return placement(place, memory_limit, strict)


def caching(placing: PlacementOptions, picture_cache: str | None, prefix_cache: str | None) -> PlacementOptions:
    from serving.dialects.python.model import with_caches

    return with_caches(placing, picture_cache, prefix_cache)
