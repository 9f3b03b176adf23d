"""The page of a server that needs tokens: who gets in, for how long, and what they may do there."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import PermissionDenied, ResourceExhausted, Unauthenticated
from runtime.pipeline import Event
from runtime.tasks.image import ImageReady, ImageRequest
from serving.page import login
from serving.page.backend import Local, Visitor
from serving.security import tokens
from serving.security.gate import Gate
from serving.security.scopes import Scope
from tests.fakes.serving import Ended, FakeServer
from tests.serving.page.conftest import Opened, Served

FORM = "application/x-www-form-urlencoded"


class Closed:
    """A page for those with the token `secret`, which may draw and is called "me"; `boss` may manage models, too."""

    def __init__(self, folder: Path) -> None:
        self.file, self.ended = folder / "tokens", Ended()
        self.secret = tokens.new(self.file, "me", frozenset({Scope.INFER}), None, 1)
        self.boss = tokens.new(self.file, "boss", frozenset(Scope), None, None)
        self.gate = Gate(self.file)
        self.fake = FakeServer(folder / "bundles", ready=True, observers=[self.ended])
        self.page = Served(self.fake, self.gate)
        self.backend = Local(self.fake.host, self.gate)

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
        """The status, the headers and the body of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.page.server.port, timeout=10)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request("GET" if body is None else "POST", f"/ui{path}", body, named)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def cookie(self, secret: str = "") -> str:
        """The cookie of who logs in."""
        body = f"token={secret or self.secret}".encode()
        status, headers, _ = self.ask("/login", body, content_type=FORM)
        assert (status, headers["location"]) == (303, "/ui/")
        return str(headers["set-cookie"])


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    made = Closed(tmp_path_factory.mktemp("closed"))
    yield made
    made.page.stop()
    made.fake.end()


def test_who_is_not_logged_in_gets_the_form_and_nothing_else(closed: Closed) -> None:
    status, headers, _ = closed.ask("/")
    assert (status, headers["location"]) == (303, "/ui/login")
    bearer = f"Bearer {closed.secret}"
    for path in ("/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a", "/assets/a.js"):
        assert closed.ask(path)[0] == 401, path
        assert closed.ask(path, authorization=bearer)[0] == 401, "a page elsewhere may make a browser send headers"
    assert closed.ask("/gradio_api/queue/join", b"{}", content_type="application/json")[0] == 401
    assert closed.ask("/gradio_api/upload", b"", content_type="multipart/form-data; boundary=x")[0] == 401
    status, headers, text = closed.ask("/login")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert b'type="password"' in text


def test_a_token_opens_the_page_until_one_logs_out(closed: Closed) -> None:
    cookie = closed.cookie()
    assert closed.secret not in cookie
    assert {"HttpOnly", "SameSite=strict", "Path=/ui"} <= {part.strip() for part in cookie.split(";")}
    status, _, text = closed.ask("/", cookie=cookie)
    assert status == 200
    assert b"Log out" in text
    assert closed.ask("/gradio_api/info", cookie=cookie)[0] == 200
    other = closed.cookie(closed.boss)
    status, headers, _ = closed.ask("/logout", b"", cookie=cookie)
    assert (status, headers["location"]) == (303, "/ui/login")
    assert 'enginecast_page=""' in headers["set-cookie"]
    assert closed.ask("/", cookie=cookie)[0] == 303
    assert closed.ask("/", cookie=other)[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"token=ec_none", 401, b"is not known here"),
        (b"token=", 401, b"a token is required"),
        (b"", 401, b"a token is required"),
        (b"token=a%0d%0aa", 400, b"letters, digits"),
        (b"token=" + b"a" * 501, 400, b"letters, digits"),
        (b"token=" + b"a" * 5000, 400, b"has more than 4,096 bytes"),
        (b"\xff", 400, b"is no form"),
        (b"&".join([b"a=b"] * 9), 400, b"is no form"),
        (b"token=<script>", 401, b"is not known here"),
    ],
)
def test_other_tokens_open_nothing(closed: Closed, body: bytes, status: int, said: bytes) -> None:
    found, headers, text = closed.ask("/login", body, content_type=FORM)
    assert (found, headers["set-cookie"]) == (status, None)
    assert said in text
    assert b"<script" not in text


def test_cookies_that_are_none(closed: Closed) -> None:
    for cookie in ("enginecast_page=", "enginecast_page=abc", "a", "enginecast_page", '"', "=;=;"):
        assert closed.ask("/", cookie=cookie)[0] == 303, cookie


def test_cookies_of_other_programs_do_not_hide_ours(closed: Closed) -> None:
    ours = closed.cookie().partition(";")[0]
    for other in ("a b=c", 'x="', "name[0]={1, 2}", "=", "a=b=c;;", "enginecast_pages=x"):
        assert closed.ask("/", cookie=f"{other}; {ours}")[0] == 200, other
        assert closed.ask("/", cookie=f"{ours}; {other}")[0] == 200, other


def test_a_page_elsewhere_logs_nobody_in(closed: Closed) -> None:
    body = f"token={closed.secret}".encode()
    status, headers, _ = closed.ask("/login", body, content_type=FORM, origin="https://evil.example")
    assert (status, headers["set-cookie"]) == (403, None)


def test_a_token_that_was_taken_out_is_of_no_use_at_once(closed: Closed) -> None:
    cookie = closed.cookie(tokens.new(closed.file, "gone", frozenset({Scope.INFER}), None, None))
    assert closed.ask("/", cookie=cookie)[0] == 200
    tokens.remove(closed.file, "gone")
    assert closed.ask("/", cookie=cookie)[0] == 303


def test_one_is_logged_out_in_time(closed: Closed, monkeypatch: pytest.MonkeyPatch) -> None:
    cookie = closed.cookie()
    monkeypatch.setattr(login, "SECONDS", 0)
    assert closed.ask("/", cookie=cookie)[0] == 303
    monkeypatch.undo()
    monkeypatch.setattr(login, "MOST", 1)
    closed.cookie()
    assert closed.ask("/", cookie=cookie)[0] == 303


def test_visitors_do_what_their_token_allows(closed: Closed) -> None:
    me, boss = (Visitor("a", f"Bearer {secret}") for secret in (closed.secret, closed.boss))

    async def drawn(visitor: Visitor) -> list[Event]:
        return [event async for event in closed.backend.run("draw", ImageRequest("a", steps=1), visitor)]

    async def two() -> None:
        first = closed.backend.run("draw", ImageRequest("a", steps=1), me)
        await anext(first)
        with pytest.raises(ResourceExhausted, match="may have 1 calls at once"):
            await drawn(me)
        assert any(isinstance(event, ImageReady) for event in await drawn(boss))
        await first.aclose()

    closed.fake.do(two())
    assert any(isinstance(event, ImageReady) for event in closed.fake.do(drawn(me)))
    for none in (Visitor("a"), Visitor("a", "Bearer no")):
        for work in (drawn(none), closed.backend.models(none), closed.backend.scripts(none)):
            with pytest.raises(Unauthenticated):
                closed.fake.do(work)
    with pytest.raises(PermissionDenied, match="needs manage"):
        closed.fake.do(closed.backend.unload("draw", me))
    closed.fake.do(closed.backend.unload("draw", boss))
    closed.fake.do(closed.backend.load("draw", boss))
    calls = [(one.method.rpartition("/")[2], one.client, one.code) for one in closed.ended.records]
    assert calls[-3:] == [
        ("UnloadModel", "me", "PERMISSION_DENIED"), ("UnloadModel", "boss", "OK"), ("LoadModel", "boss", "OK")
    ]  # fmt: skip
    assert json.loads(closed.ended.records[-1].request) == {"name": "draw"}


@pytest.mark.full
def test_one_logs_in_draws_and_logs_out(chromium: Any, closed: Closed) -> None:
    opened = Opened(chromium, f"{closed.page.url}/ui/", closed.secret, viewport={"width": 1200, "height": 900})
    page = opened.page
    opened.says("#draw-width", "64 to 512")
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    opened.tab("Models")
    page.click("#models-unload")
    opened.says("#models-status", "needs manage")
    page.get_by_role("button", name="Log out").click()
    page.wait_for_selector("#token")
    assert opened.elsewhere == []
    opened.close()
