"""`enginecast token`: bearer tokens for the clients of a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.security.scopes import Scope
from serving.settings import PREFIX

TokenFile = Annotated[
    Path, typer.Option("--tokens", metavar="FILE", envvar=f"{PREFIX}TOKENS", help="File of tokens of the server.")
]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Bearer tokens for the clients of a server."
)


@app.callback()
def token() -> None:
    """Bearer tokens for the clients of a server."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the client: letters, digits, dots, dashes and underscores.")],
    tokens: TokenFile,
    scope: Annotated[
        list[Scope],
        typer.Option(help="infer: requests; manage: load and unload models; metrics: read metrics. May be repeated."),
    ],
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests that it may make in a minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Calls that it may have at once.")] = None,
) -> None:
    """Make a token and print it. The file, made if missing, has only its hash: the token cannot be shown again."""
    from serving.security.tokens import new

    print(new(tokens, name, frozenset(scope), requests_per_minute, concurrent), flush=True)
    sys.stderr.write(
        f"{name} is in {tokens}; running servers accept it from now on. Keep the token: it is not stored.\n"
    )


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name of the client, as it is in the file.")], tokens: TokenFile
) -> None:
    """Take a token out of the file: calls with it end from now on with UNAUTHENTICATED."""
    from serving.security.tokens import remove

    remove(tokens, name)
    print(f"{name} is no longer in {tokens}; running servers refuse it from now on")
