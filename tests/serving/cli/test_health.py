"""`enginecast health`, for probes."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from runtime.errors import NotFound, Unavailable
from serving.cli import commands as cli
from tests.fakes.serving import FakeServer


def check(server: FakeServer, *arguments: str) -> tuple[int, str]:
    """The exit code and what is printed."""
    ended = CliRunner().invoke(cli.app, ["health", *arguments, "--address", server.address])
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return ended.exit_code, ended.stdout


def test_a_server_serves_once_a_model_is_ready(warm: FakeServer) -> None:
    assert check(warm) == (0, "serving\n")
    assert check(warm, "talk") == check(warm, "enginecast.v1.ModelService") == (0, "serving\n")
    warm.client.unload("draw")
    assert check(warm, "draw") == (1, "not serving\n") and check(warm)[0] == 0


def test_a_server_that_is_not_there(warm: FakeServer) -> None:
    with pytest.raises(NotFound, match="'none' is not known"):
        check(warm, "none")
    warm.stop()
    with pytest.raises(Unavailable, match="no server answers"):
        check(warm)
