"""A page for a fake server, and Chromium without a window to open it in."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from google.protobuf import json_format

from runtime.pipeline import Event
from runtime.placing.measured import SHIPPED
from runtime.task import Request
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from serving.dialects.http.server import HttpServer
from serving.host.models import ModelHost
from serving.page.backend import Local, Models, Visitor
from serving.security.gate import Gate
from tests.fakes.serving import FakeServer

CAN: dict[str, Any] = {
    "min_edge": 64,
    "max_edge": 512,
    "default_edge": 256,
    "edge_multiple": 8,
    "defaults": {"steps": 6, "guidance_scale": 2.0, "sampler": "ddim", "strength": 0.5},
    "samplers": ["ddim", "euler"],
    "image": True,
    "masked": False,
    "controls": ["canny"],
    "styles": ["photo"],
    "loras": ["pixel"],
    "conditions": ["original_size", "target_size"],
}
"""The abilities of a model that has everything."""


class Able(Local):
    """A host whose drawing model says what it can, `can`. `requests` are those that it got."""

    def __init__(self, host: ModelHost, gate: Gate | None = None) -> None:
        super().__init__(host, gate)
        self.can: dict[str, Any] = dict(CAN)
        self.requests: list[Request] = []

    def run(self, model: str, request: Request, visitor: Visitor) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        return super().run(model, request, visitor)

    async def models(self, visitor: Visitor) -> Models:
        found = await super().models(visitor)
        for model in found:
            if model.name == "draw":
                json_format.ParseDict(self.can, model.abilities)
        return found


class Served:
    """The page of a fake server at `url`, for those that a `gate` admits."""

    def __init__(self, fake: FakeServer, gate: Gate | None = None) -> None:
        from serving.page.application import Application  # imports Gradio, which one process of a run needs

        self.fake, self.backend = fake, Able(fake.host, gate)

        async def start() -> HttpServer:
            self.application = Application(self.backend, sorted(SHIPPED.glob("*.jsonl")), gate)
            server = HttpServer(self.application, "127.0.0.1:0", leaving=self.application.leave)
            await server.start()
            return server

        self.server = fake.do(start())
        self.url = self.server.url

    @property
    def seen(self) -> list[Any]:
        """The requests for pictures so far."""
        return [request for request in self.backend.requests if isinstance(request, ImageRequest)]

    @property
    def asked(self) -> list[Any]:
        """The requests for answers so far."""
        return [request for request in self.backend.requests if isinstance(request, ChatRequest)]

    def stop(self) -> None:
        """Stop the page's server."""
        self.fake.do(self.server.stop())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with FakeServer(tmp_path_factory.mktemp("page") / "bundles", ready=True) as fake:
        page = Served(fake)
        yield page
        page.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Chromium without a window. Skips where there is none. While it is there, the thread has a running event loop."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs chromium on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in the browser, where one logs in with a `token` if there is one. `elsewhere` are the addresses of other
    machines that it tried to reach, `faults` what went wrong in it.
    """

    def __init__(self, browser: Any, url: str, token: str = "", **context: Any) -> None:
        self.elsewhere: list[str] = []
        self.faults: list[str] = []
        self._context = browser.new_context(**context)
        self.page = self._context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.route("**/*", self._allowed)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("response", self._answered)
        self.page.goto(url)
        if token:
            self.page.fill("#token", token)
            self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#draw-prompt textarea")

    def close(self) -> None:
        self._context.close()

    def _allowed(self, route: Any) -> None:
        url = route.request.url
        if url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            route.continue_()
        else:
            self.elsewhere.append(url)
            route.abort()

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.faults.append(f"{response.status} {response.url}")

    def tab(self, name: str) -> None:
        """Show a tab. On a narrow screen some are in a menu."""
        tab = self.page.get_by_role("tab", name=name)
        if not tab.is_visible():
            self.page.locator("#tabs .overflow-menu > button").click()
            tab = self.page.locator("#tabs .overflow-dropdown button", has_text=name)
        tab.click()

    def chosen(self, part: str, name: str) -> None:
        """Choose one of a list."""
        self.page.locator(f"{part} input").click()
        self.page.locator(f"{part} ul li").filter(has_text=name).first.click()
        self.page.keyboard.press("Escape")

    def typed(self, part: str, row: int, column: int, text: str) -> None:
        """Fill in a cell of a table."""
        self.page.locator(f"{part} [data-row='{row}'][data-col='{column}']").dblclick()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")
        self.page.wait_for_timeout(500)  # the table tells its new content a moment later

    def says(self, part: str, text: str) -> None:
        """Wait until a part of the page has a text."""
        self.page.wait_for_function(
            "([part, text]) => document.querySelector(part)?.innerText.includes(text)", arg=[part, text]
        )

    def until(self, condition: Callable[[], bool], seconds: float = 15) -> None:
        """Wait for something that happens on the server. Meanwhile the page goes on."""
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, "it did not happen in time"
            self.page.wait_for_timeout(20)

    def seen(self, part: str) -> None:
        """Wait until a picture in a part of the page is loaded."""
        self.page.wait_for_function(
            "part => [...document.querySelectorAll(part + ' img')].some(image => image.complete && image.naturalWidth)",
            arg=part,
        )


@pytest.fixture
def opened(chromium: Any, served: Served) -> Iterator[Opened]:
    served.fake.draw.release()
    page = Opened(chromium, served.url, viewport={"width": 1200, "height": 900})
    page.says("#draw-model", "")
    yield page
    page.close()
