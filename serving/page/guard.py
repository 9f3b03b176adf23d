"""What every request to the page passes before Gradio: which of its paths the page uses, how much may be sent, and that
no file or address is opened because a client names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from runtime.errors import EnginecastError, InvalidInput, NotFound
from runtime.vision.images import PictureFile
from serving.dialects.http.pages import App, Event, Receive, Send, bounded
from serving.page.pictures import read

API: Final = "gradio_api"
FILE: Final = f"/{API}/file="
PATHS: Final = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|pwa_icon(/\d+)?)/?"
    r"|/(assets|static|svelte)/.+"
    rf"|/{API}/(info|startup-events|heartbeat/\w+|queue/(join|data)|cancel|reset|upload|upload_progress"
    r"|component_server|theme\.css|file=.+)/?"
)
"""The paths that the page uses. The others of Gradio are refused."""
JOIN: Final = f"/{API}/queue/join"
DEPTH: Final = 30
"""Levels of lists and objects in what is filled in."""


class Guard:
    """An ASGI application in front of Gradio's, which is mounted at `prefix`. `folder` is where its files lie."""

    def __init__(self, app: App, prefix: str, folder: Path) -> None:
        self._app, self._prefix, self._folder = app, prefix, folder.resolve()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            path = scope["path"].removeprefix(self._prefix)
            self._check(scope, path)
            receive = bounded(receive)
            if path.rstrip("/") == JOIN:
                receive = again(self._checked(await whole(receive)))
        except EnginecastError as error:
            status = 404 if isinstance(error, NotFound) else 400
            text = str(error)
            await JSONResponse({"detail": text, "error": text}, status)(scope, receive, send)
            return
        with suppress(ClientDisconnect):
            await self._app(scope, receive, send)

    def _check(self, scope: Any, path: str) -> None:
        """Raise NotFound for paths that the page does not use."""
        if scope["type"] != "http" or PATHS.fullmatch(path) is None:
            raise NotFound("the page has nothing there")
        if path.startswith(FILE):
            self._inside(unquote(path.removeprefix(FILE)))

    def _inside(self, name: Any) -> Path:
        """A file of the page's own. Raises NotFound for all others, and for addresses."""
        try:
            path = Path(name)
            if path.is_absolute() and path.resolve().is_relative_to(self._folder):
                return path
        except (TypeError, ValueError, OSError):
            pass
        raise NotFound("the page has no such file: upload it again")

    def _checked(self, body: bytes) -> bytes:
        """What is filled in, if the files that it names are pictures of the page's own. Raises InvalidInput and
        NotFound.
        """
        try:
            filled = json.loads(body)
        except (ValueError, RecursionError):
            raise InvalidInput("body", "is no JSON text") from None
        for file in files(filled):
            if file.get("url") is not None and not isinstance(file["url"], str):
                raise InvalidInput("url", "is no text")
            path = self._inside(file.get("path"))
            PictureFile.open(read(path), "picture")
        return body


def files(filled: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Every object in what is filled in that names a file. Raises InvalidInput where it is nested too deep."""
    if depth > DEPTH:
        raise InvalidInput("body", f"is nested deeper than {DEPTH} levels")
    if isinstance(filled, dict):
        if filled.get("path") is not None:
            yield filled
        for value in filled.values():
            yield from files(value, depth + 1)
    elif isinstance(filled, list):
        for value in filled:
            yield from files(value, depth + 1)


async def whole(receive: Receive) -> bytes:
    """The body of a request."""
    body = bytearray()
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body", False):
            return bytes(body)


def again(body: bytes) -> Receive:
    """`receive` of a body that was read."""
    sent = False

    async def receive() -> Event:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body}

    return receive
