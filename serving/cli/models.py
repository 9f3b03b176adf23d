"""`enginecast models`: the models of a server, and their changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from serving.cli.options import ADDRESS, ConnectionOptions, KeepAlive, Target, parse_keep_alive, with_connection

if TYPE_CHECKING:
    from serving.dialects.grpc.client import Client
    from serving.enginecast_pb import model_pb2

Address = Annotated[str, typer.Option(help="Server to ask, HOST:PORT.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model, as `enginecast models list` shows it.")]
PREFIX: Final = "MODEL_STATE_"

app = typer.Typer(no_args_is_help=True, help="The models of a server: list, load, unload and reload them.")


@app.command("list")
@with_connection
def list_models(
    connection: ConnectionOptions,
    address: Address = ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Every model of a server: its state, memory and use."""
    with _client(connection, address) as client:
        rows = [_row(model) for model in client.models()]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        _print(rows)


@app.command()
@with_connection
def load(
    connection: ConnectionOptions,
    name: Name,
    address: Address = ADDRESS,
    target: Target = None,
    keep_alive: KeepAlive = None,
) -> None:
    """Load a model and wait until it is ready."""
    seconds = parse_keep_alive(keep_alive)
    with _client(connection, address) as client:
        model = client.load(name, target, keep_alive_seconds=seconds)
    print(f"{model.name} is ready on {model.target} ({model.device})")


@app.command()
@with_connection
def unload(
    connection: ConnectionOptions,
    name: Name,
    address: Address = ADDRESS,
    grace: Annotated[
        float | None, typer.Option(min=0, max=3600, help="Seconds that its requests get to finish.")
    ] = None,
) -> None:
    """Unload a model and wait until its memory is free. Requests do not load it again."""
    with _client(connection, address) as client:
        print(f"{client.unload(name, grace).name} is unloaded")


@app.command()
@with_connection
def reload(connection: ConnectionOptions, name: Name, address: Address = ADDRESS) -> None:
    """Load the bundle that is in a model's folder now. The model serves until the new one is ready."""
    with _client(connection, address) as client:
        model = client.reload(name)
    print(f"{model.name} is ready on {model.target} ({model.device})")


@contextmanager
def _client(connection: ConnectionOptions, address: str) -> Iterator[Client]:
    from serving.dialects.grpc.client import Client
    from serving.dialects.grpc.connection import Connection

    with Client(address, Connection(**connection.connection())) as client:
        yield client


def _row(model: model_pb2.Model) -> dict[str, Any]:
    """A model as a row of the table. Sizes are in bytes, times in seconds, null where there are none."""
    from serving.enginecast_pb import model_pb2

    return {
        "name": model.name,
        "default": model.is_default if model.version else None,
        "state": model_pb2.ModelState.Name(model.state).removeprefix(PREFIX).lower(),
        "loading": ", ".join(model.loading_submodels),
        "quant": model.quant,
        "device": model.device,
        "memory": sum(model.memory_bytes.values()) if model.memory_bytes else None,
        "running": model.running,
        "queued": model.queued,
        "idle": round(model.idle_seconds) if model.HasField("idle_seconds") else None,
        "unloads in": round(model.unload_seconds) if model.HasField("unload_seconds") else None,
        "loads on demand": model.loads_on_demand,
        "error": model.error,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from serving.cli.overview import console, table

    console().print(table(rows, "models") if rows else "the server has no models")
