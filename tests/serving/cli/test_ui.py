"""`enginecast ui`, and the page beside a server."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime.errors import InvalidInput
from serving.cli import commands as cli
from serving.cli.start import others, security
from serving.dialects.http.server import HttpServer
from serving.host.models import ModelHost
from serving.security import tokens
from serving.security.scopes import Scope
from serving.settings import Settings
from tests.fakes.serving import FakeServer

ENGINECAST = [sys.executable, "-m", "serving.cli.commands"]


@pytest.mark.full
def test_the_page_of_a_server_elsewhere(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    with FakeServer(tmp_path / "bundles") as fake:
        command = [*ENGINECAST, "ui", "--address", fake.address, "--listen", "127.0.0.1:0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as page:
            try:
                assert page.stdout is not None
                said, url = page.stdout.readline().strip().split(" is at ")
                assert said == f"the page of {fake.address}"
                with urllib.request.urlopen(url, timeout=10) as answer:
                    assert b"enginecast" in answer.read()
                assert len(list(temporary.glob("enginecast-page-*"))) == 1
                page.send_signal(signal.SIGTERM)
                assert page.wait(20) == 0
            finally:
                page.kill()
    assert list(temporary.glob("enginecast-page-*")) == []


def test_bundles_and_a_server_exclude_each_other() -> None:
    ended = CliRunner().invoke(cli.app, ["ui", "bundles/a", "--address", "127.0.0.1:1"])
    assert isinstance(ended.exception, InvalidInput)
    assert str(ended.exception).startswith("address: belongs to a server elsewhere")


async def test_the_page_needs_http_and_asks_for_a_token_where_the_server_does(tmp_path: Path) -> None:
    host = ModelHost([], lambda bundle, target: pytest.fail())
    with pytest.raises(InvalidInput, match=r"page: is of no effect without --http"):
        others(host, Settings(page=True), security(Settings()))
    pytest.importorskip("gradio")
    file = tmp_path / "tokens"
    tokens.new(file, "me", frozenset({Scope.INFER}), None, None)
    closed = Settings(page=True, http="127.0.0.1:0", tokens=file)
    (server,) = others(host, closed, security(closed))
    assert isinstance(server, HttpServer)
    await server.start()
    status, place = await asyncio.to_thread(_opened, server.port)
    await server.stop()
    assert (status, place) == (303, "/ui/login")
    await host.close()


def _opened(port: int) -> tuple[int, str | None]:
    """The status of the page, and where it leads."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/ui/")
        response = connection.getresponse()
        return response.status, response.headers["location"]
    finally:
        connection.close()
