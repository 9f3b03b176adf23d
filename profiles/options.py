"""Options of the measuring commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from calibration.ground import machine
from runtime.errors import InvalidInput
from runtime.limits import PICTURE_TOKENS
from runtime.placing.measured import user_folder
from serving.settings import Settings

if TYPE_CHECKING:
    from profiles.serving.load import Load

Targets = Annotated[
    list[str] | None, typer.Option("--target", help="Engine to run on; repeat for several. Default: all of the bundle.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads per engine, 0 = all cores.")]
PictureTokens = Annotated[
    int | None,
    typer.Option(
        min=1, max=PICTURE_TOKENS.most, help="Positions that the model reads of each picture it is asked about."
    ),
]
Forecast = Annotated[
    str | None, typer.Option(metavar="STEPS", help="Steps of pictures that run the UNet. Default: every step.")
]
Store = Annotated[bool, typer.Option("--store", help="Append the rows to a file.")]
StoreAt = Annotated[
    Path | None, typer.Option("--rows", help="That file. Default: rows/PROCESSOR.jsonl in the user's data folder.")
]


def rows_file_of(store: bool, path: Path | None) -> Path | None:
    """The file that rows are appended to, None without --store. Raises InvalidInput for a file without --store."""
    if path is not None and not store:
        raise InvalidInput("rows", "is where --store puts rows: give that too")
    return (path or user_folder() / f"{machine.slug()}.jsonl") if store else None


CLIENTS: Final = (1, 2, 4, 8)
"""Of closed loads, where no load is given."""
EACH: Final = 4
"""Requests of each client."""
ARRIVING: Final = 32
"""Requests of an open load."""


@dataclass(frozen=True)
class SizeOptions:
    """Options of `bench` on what is measured of the models of a task."""

    width: Annotated[int | None, typer.Option(min=1, help="Width of pictures in pixels.")] = None
    height: Annotated[int | None, typer.Option(min=1, help="Height of pictures in pixels.")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of a whole picture.")] = None
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of the text prompt that prefill and decode begin with. Default: 512."),
    ] = None
    new_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens to decode. Default: 64.")] = None
    pictures: Annotated[
        bool | None, typer.Option("--pictures", help="With --serve, each question is about a picture of its own.")
    ] = None
    picture_tokens: PictureTokens = None
    forecast: Forecast = None


@dataclass(frozen=True)
class LoadOptions:
    """Options of `bench --serve`."""

    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="Measure a server of the bundle under load: throughput, and seconds to the first output."
        ),
    ] = False
    clients: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=256, help="Closed load: so many clients, each with one request at a time; may be repeated. "
            "Default: 1, 2, 4 and 8.",
        ),
    ] = None  # fmt: skip
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.001, max=1000, help="Open load: requests a second, arriving at random; may be repeated."),
    ] = None
    requests: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Requests of a load. Default: 4 of each client, 32 of an open load."),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Measure this server, which serves the bundle. TLS and token: ENGINECAST_CA, ENGINECAST_TOKEN. "
            "Default: a server that is started for it.",
        ),
    ] = None
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The bundle's name on that server. Default: its own.")
    ] = None

    def loads(self) -> tuple[Load, ...]:
        """What is measured, the closed loads first."""
        from profiles.serving.load import CLOSED, OPEN, Load

        clients = self.clients or (() if self.rate else CLIENTS)
        closed = [Load(CLOSED, count, self.requests or EACH * count) for count in clients]
        return (*closed, *(Load(OPEN, rate, self.requests or ARRIVING) for rate in self.rate or ()))

    @property
    def most(self) -> int:
        """Requests that a server started here runs at once: all of a closed load, as many as usual of an open one."""
        most: int = Settings.parallel
        return max(most, *(self.clients or CLIENTS))

    def check(self, metric: object, target: object, pictures: object) -> None:
        """Raise InvalidInput for options that do not go together."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "serve"} | {
            "pictures": pictures
        }
        for name in (name for name, value in own.items() if value and not self.serve):
            raise InvalidInput(name, "belongs to --serve: give that too")
        if self.serve and metric:
            raise InvalidInput("metric", "and --serve exclude each other: leave it out")
        if self.model and not self.address:
            raise InvalidInput("model", "belongs to --address: give that too")
        if self.address and target:
            raise InvalidInput("target", "and --address exclude each other: the server at the address has chosen one")


def fitting(task: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given. Raises InvalidInput for one that applies to models of another task."""
    from profiles.task import profile_tasks

    fitting = profile_tasks()[task]
    given = {name: value for name, value in options.items() if value is not None}
    for option in (name.replace("_", "-") for name in given):
        if option not in fitting.options:
            raise InvalidInput(option, f"does not apply to a model that {fitting.does}: leave it out")
    return given
