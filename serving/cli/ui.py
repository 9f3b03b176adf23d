"""What `enginecast ui` does: the web page of a server elsewhere, or of bundles that it serves itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from typing import Any

from runtime.optional import require
from runtime.placing.measured import default_files
from serving.cli.start import announce, start
from serving.settings import Settings


def beside(bundles: list[str], listen: str) -> None:
    """Serve bundles, and the page beside them: `enginecast serve` with the page."""
    start(Settings(bundles=bundles, address="127.0.0.1:0", http=listen, page=True))


def alone(address: str, listen: str, connection: Mapping[str, Any]) -> None:
    """Serve the page alone, for the models of a server. `connection` are the options of `enginecast.Client`."""
    for module, extra in (("fastapi", "http"), ("uvicorn", "http"), ("gradio", "ui")):
        require(module, extra)
    from serving.dialects.http.server import HttpServer
    from serving.page.application import PREFIX, Application
    from serving.page.backend import Remote

    async def run() -> None:
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stopped.set)
        page = Application(Remote(address, **connection), default_files())
        server = HttpServer(page, listen, leaving=page.leave)
        await server.start()
        announce(f"the page of {address} is at {server.url}{PREFIX}/")
        await stopped.wait()
        await server.stop()

    asyncio.run(run())
