"""`enginecast token`: bearer tokens for the clients of a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.security.scopes import Scope
from serving.settings import PREFIX

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Bearer tokens for the clients of a server."
)


@app.callback()
def token() -> None:
    """Bearer tokens for the clients of a server."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the client: letters, digits, dots, dashes and underscores.")],
    tokens: Annotated[
        Path,
        typer.Option(metavar="FILE", envvar=f"{PREFIX}TOKENS", help="File of tokens of the server; made if missing."),
    ],
    scope: Annotated[
        list[Scope],
        typer.Option(help="infer: requests; manage: load and unload models; metrics: read metrics. May be repeated."),
    ],
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests that it may make in a minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Calls that it may have at once.")] = None,
) -> None:
    """Make a token and print it. The file has only its hash: the token cannot be shown again."""
    from serving.security.tokens import new

    print(new(tokens, name, frozenset(scope), requests_per_minute, concurrent), flush=True)
    sys.stderr.write(
        f"{name} is in {tokens}; running servers accept it from now on. Keep the token: it is not stored.\n"
    )
