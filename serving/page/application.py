"""The page as an ASGI application at /ui."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App
from starlette.responses import PlainTextResponse, RedirectResponse

from runtime import limits
from serving.dialects.http import pages
from serving.dialects.http.pages import Receive, Send
from serving.page.backend import Backend
from serving.page.guard import Guard
from serving.page.login import Login
from serving.page.page import SCRIPT, STYLE, blocks, theme
from serving.page.parts import Page
from serving.page.runs import Runs
from serving.security.gate import Gate

PREFIX: Final = "/ui"
ICON: Final = '<link rel="icon" href="data:,">'
"""No picture for the browser's tab: without this, browsers ask for one."""
FOLDER: Final = "GRADIO_TEMP_DIR"
"""The variable that says where Gradio puts files."""


class Application:
    """The page of a backend; other paths lead to it. It has a folder of its own for pictures, which is removed with it.

    `rows` are files of measured rows. Where the `gate` needs tokens, the page asks for one.
    """

    def __init__(self, backend: Backend, rows: Sequence[Path] = (), gate: Gate | None = None) -> None:
        folder = Path(tempfile.mkdtemp(prefix="enginecast-page-"))
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        os.environ[FOLDER] = str(folder)  # Gradio reads it whenever it writes a file
        self._backend = backend
        self._made = made = blocks(Page(backend, Runs(backend), folder, rows, bool(gate and gate.closed)))
        inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        gr.mount_gradio_app(
            inner, made, PREFIX, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
            enable_monitoring=False, show_error=False, max_file_size=limits.PICTURE_BYTES.most, theme=theme(),
            css_paths=STYLE, js=SCRIPT.read_text("utf-8"), head=ICON,
        )  # fmt: skip
        made.has_launched = True  # from then on Gradio checks which files it reads
        guard = Guard(inner, PREFIX, folder)
        self._entry = Login(guard, PREFIX, gate) if gate is not None and gate.closed else guard
        self._inner, self.folder = inner, folder.resolve()

    def before(self, others: pages.App) -> pages.App:
        """The page together with another application: browsers that open the root are led to the page."""

        async def dispatch(scope: Any, receive: Receive, send: Send) -> None:
            await (self if scope["type"] == "lifespan" or _is_of_page(scope) else others)(scope, receive, send)

        return dispatch

    def leave(self) -> None:
        """End the streams of the pages that are open."""
        self._made.close(verbose=False)
        for route in self._inner.routes:
            if isinstance(app := getattr(route, "app", None), App):
                app.stop_event.set()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._inner(scope, receive, send)
            finally:
                await self._backend.close()
                self._remove()
        elif scope["path"].startswith(f"{PREFIX}/"):
            await self._entry(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] in ("/", PREFIX):
            await RedirectResponse(f"{PREFIX}/")(scope, receive, send)
        else:
            await PlainTextResponse(f"there is nothing here: the page is at {PREFIX}/", 404)(scope, receive, send)


def _is_of_page(scope: Any) -> bool:
    """Whether a request is for the page, or of a browser that opens the root."""
    path = scope["path"]
    accepted = b", ".join(value for name, value in scope["headers"] if name == b"accept")
    opened = path == "/" and scope["type"] == "http" and scope["method"] == "GET" and b"text/html" in accepted
    return path == PREFIX or path.startswith(f"{PREFIX}/") or opened
