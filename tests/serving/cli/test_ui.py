"""`enginecast ui`, and the page beside a server."""

from __future__ import annotations

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


def test_the_page_needs_http_and_a_server_without_tokens(tmp_path: Path) -> None:
    host = ModelHost([], lambda bundle, target: pytest.fail())
    with pytest.raises(InvalidInput, match=r"page: is of no effect without --http"):
        others(host, Settings(page=True), security(Settings()))
    file = tmp_path / "tokens"
    tokens.new(file, "me", frozenset({Scope.INFER}), None, None)
    closed = Settings(page=True, http="127.0.0.1:0", tokens=file)
    with pytest.raises(InvalidInput, match=r"page: sends no token"):
        others(host, closed, security(closed))
