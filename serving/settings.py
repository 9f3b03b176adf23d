"""The settings of a server. Each is a field of `Settings`: type, range, unit, default and help are stated once. The
options of `enginecast serve` are made from it, and docs/serving/settings.md lists it.

A value comes from the command line, else from the environment, else from the file of `--config`, else it is the
default. The file is TOML, with the names of the fields as keys. The variable of `max_queue` is
ENGINECAST_SERVE_MAX_QUEUE; a list has commas between its items, and an empty variable counts as not set.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import typer

from runtime.errors import InvalidInput, NotFound, did_you_mean
from runtime.files import read_regular
from serving.cli.options import (
    ADDRESS,
    TIMES,
    DeviceName,
    MemoryLimit,
    PictureCache,
    PlaceText,
    PrefixCache,
    Strict,
    Target,
    Threads,
)

PREFIX: Final = "ENGINECAST_SERVE_"
"""Of the environment variables."""
CONFIG: Final = f"{PREFIX}CONFIG"
"""The variable that names the file."""
DEFAULT: Final = "default"
"""The origin of a value that nobody gave."""
LARGEST_FILE: Final = 1 << 20
"""Bytes of a file of settings."""


@dataclass(frozen=True)
class Settings:
    """Every setting of a server."""

    bundles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]DIR...",
            help="Folders made by `enginecast build`. With a name, requests use that instead of the bundle's own: "
            "int8=DIR int4=DIR.",
        ),
    ] = None
    repository: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of bundles to serve, DIR/NAME or DIR/NAME/VERSION. It is looked through every 2 seconds. Its "
            "models are loaded for their first request.",
        ),
    ] = None
    default_versions: Annotated[
        list[str] | None,
        typer.Option(
            "--default-version",
            metavar="NAME@VERSION",
            help="Version of a model that requests get which state none. Default: the highest.",
        ),
    ] = None
    engine: Annotated[
        str,
        typer.Option(help="What runs the models: this process (local), or replicas on a Ray cluster (ray, extra ray)."),
    ] = "local"
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Ray cluster to join, or auto. Default: one is started on this machine alone."
        ),
    ] = None
    min_replicas: Annotated[
        int, typer.Option(min=0, help="Replicas of each model that always run on a Ray cluster.")
    ] = 1
    max_replicas: Annotated[int, typer.Option(min=1, help="Replicas of each model under load on a Ray cluster.")] = 4
    scale_down: Annotated[
        float, typer.Option(min=0, help="Seconds of less load after which a replica on a Ray cluster is stopped.")
    ] = 300.0
    replica_cpus: Annotated[float, typer.Option(min=0, help="CPU cores that a Ray cluster reserves for a replica.")] = (
        1.0
    )
    replica_gpus: Annotated[float, typer.Option(min=0, help="GPUs that a Ray cluster reserves for a replica.")] = 0.0
    address: Annotated[
        str,
        typer.Option(help="HOST:PORT to listen on; port 0 takes a free one. Other addresses than loopback need TLS."),
    ] = ADDRESS
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file of the server's certificate, with those that lead to its authority. Read again when it "
            "changes.",
        ),
    ] = None
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of its private key. Read again when it changes.")
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="PEM file of an authority: only clients with a certificate of it may connect."
        ),
    ] = None
    insecure: Annotated[
        bool, typer.Option("--insecure/--no-insecure", help="Allow other addresses than loopback without TLS.")
    ] = False
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of tokens, made by `enginecast token new`: every call needs one of them, except checks of "
            "health. Read again when it changes.",
        ),
    ] = None
    audit_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File to append a line of JSON to for every call that manages models."),
    ] = None
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Where to listen for HTTP, for clients of other programs, web pages and curl (extra http). Without a "
            "port: 11434, that of Ollama. Default: nowhere.",
        ),
    ] = None
    http_origins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Web pages that may call it, such as https://example.org. Default: none may."
        ),
    ] = None
    http_hosts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Names by which clients may call it, besides localhost and addresses: gpu-box."
        ),
    ] = None
    fetch_hosts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Hosts that pictures of chats may be fetched from by https: URLs. One with an address that is not "
            "public needs that address in the list, too. Default: none, and nothing is fetched.",
        ),
    ] = None
    library: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of bundles, laid out as a repository, that clients of Ollama may pull into the --repository.",
        ),
    ] = None
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of checkpoints that clients of Ollama may build bundles from, into the --repository (extra "
            "export).",
        ),
    ] = None
    wildcards: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of text files for the script wildcards.")
    ] = None
    styles: Annotated[Path | None, typer.Option(metavar="FILE", help="File styles.csv for the script styles.")] = None
    page: Annotated[
        bool,
        typer.Option(
            "--page/--no-page",
            help="Serve the web page at /ui there, where browsers that open the root are led to (extra ui). With "
            "--tokens, one logs in there with a token.",
        ),
    ] = False
    target: Target = None
    device: DeviceName = ""
    place: PlaceText = None
    memory_limit: MemoryLimit = None
    strict: Strict = False
    picture_cache: PictureCache = None
    prefix_cache: PrefixCache = None
    require_signature: Annotated[
        Path | None,
        typer.Option(metavar="PUBLIC_KEY", help="Serve only bundles signed with this key's private half (a PEM file)."),
    ] = None
    threads: Threads = 0
    keep_alive: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help=f"How long models stay loaded if nobody uses them, {TIMES}. Requests "
            "may state another time. Default: models named on the command line always stay, and those of the "
            "repository stay for 5m.",
        ),
    ] = None
    warm_up: Annotated[
        bool, typer.Option("--warm-up/--no-warm-up", help="Run a model once, on examples, before it counts as ready.")
    ] = False
    models_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that all loaded models together may take on each device, such as 24GiB. Loading another one "
            "unloads models that nobody uses, the least recently used first. Models that always stay are not unloaded.",
        ),
    ] = None
    parallel: Annotated[
        int,
        typer.Option(
            min=1, max=256, help="Requests that run at once per model: answers in one run, pictures taking turns."
        ),
    ] = 8
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait per model.")] = 16
    grace: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that running requests get to finish when the server stops.")
    ] = 30.0
    log_format: Annotated[
        str, typer.Option(help="Format of the log on standard error: text, or json, an object a line.")
    ] = "text"
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve metrics for Prometheus over HTTP here; they need the extra metrics."
        ),
    ] = None
    traces: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send traces to this OpenTelemetry collector (OTLP over gRPC), such as http://127.0.0.1:4317; they "
            "need the extra tracing.",
        ),
    ] = None


@dataclass(frozen=True)
class Configuration:
    """The settings of a server, and where each value came from, by name."""

    settings: Settings
    origins: Mapping[str, str]

    def toml(self) -> str:
        """Every setting as a line of a TOML file, with the origin of its value behind it."""
        return "".join(map(self._line, names()))

    def _line(self, name: str) -> str:
        value, origin = getattr(self.settings, name), self.origins.get(name, DEFAULT)
        return f"# {name} is not set\n" if value is None else f"{name} = {_toml(value)}  # {origin}\n"


@cache
def hints() -> dict[str, Any]:
    """The annotation of each setting, with its option."""
    return get_type_hints(Settings, include_extras=True)


def names() -> list[str]:
    """The names of all settings, in the order of their declaration."""
    return [field.name for field in fields(Settings)]


def declared(name: str) -> tuple[Any, Any]:
    """The type of a setting, and its option or argument of the command line."""
    kind, option = get_args(hints()[name])[:2]
    return kind, option


def configure(flags: Mapping[str, Any], file: Path | None, environment: Mapping[str, str]) -> Configuration:
    """Join the values of the file, the environment and the command line; the last one wins.

    Raises InvalidInput that names the setting and the origin of a value that is refused, and NotFound.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, value, origin in _given(flags, file, environment):
        values[name], origins[name] = _within(name, value, origin), origin
    return Configuration(Settings(**values), origins)


def _given(
    flags: Mapping[str, Any], file: Path | None, environment: Mapping[str, str]
) -> Iterator[tuple[str, Any, str]]:
    """Name, value and origin of everything that was given, from the weakest to the strongest."""
    for name, value in (_read(file) if file else {}).items():
        origin = str(file)
        _known(name, names(), origin)
        yield name, _parsed(name, value, origin), origin
    variables = {f"{PREFIX}{name.upper()}": name for name in names()}
    for variable, text in environment.items():
        if text and variable.startswith(PREFIX) and variable != CONFIG:
            _known(variable, variables, "the environment")
            yield variables[variable], _parsed(variables[variable], text, variable, text=True), variable
    for name, value in flags.items():
        yield name, value, "the command line"


def _read(file: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    try:
        return tomllib.loads(read_regular(file, LARGEST_FILE).decode())
    except FileNotFoundError:
        raise NotFound(f"there is no file of settings {file}: check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("config", f"{file} is no TOML file: {error}") from None


def _known(name: str, known: Any, origin: str) -> None:
    if name not in known:
        raise InvalidInput(name, f"is no setting ({origin}): {did_you_mean(name, known)}")


def _parsed(name: str, value: Any, origin: str, text: bool = False) -> Any:
    """The value of a setting as its type; `text` if it is text of an environment variable."""
    from pydantic import TypeAdapter, ValidationError

    kind, _ = declared(name)
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        if text:
            return adapter.validate_python(value.split(",") if _is_list(kind) else value)
        return adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise InvalidInput(name, f"is {value!r} ({origin}): {error.errors()[0]['msg']}") from None


def _is_list(kind: Any) -> bool:
    return any(get_origin(one) is list for one in (kind, *get_args(kind)))


def _within(name: str, value: Any, origin: str) -> Any:
    """The value, if it is in the range of its option."""
    _, option = declared(name)
    low, high = option.min, option.max
    if isinstance(value, int | float) and not (
        (low is None or value >= low) and (high is None or value <= high)
    ):  # true of NaN too, which typer lets pass
        above = f"at least {low}" if high is None else f"{low} to {high}"
        raise InvalidInput(name, f"is {value} ({origin}), expected {above}")
    return value


def _toml(value: Any) -> str:
    """A value in TOML, whose strings and lists of strings are those of JSON."""
    return json.dumps(value, ensure_ascii=False, default=str)
