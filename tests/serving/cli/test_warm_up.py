"""`enginecast serve --repository DIR --warm-up` as a process of its own, with a real model."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from serving.dialects.python.client import Client
from serving.enginecast_pb import model_pb2

ROOM = 64 << 20


@pytest.mark.skipif(find_spec("torch") is None, reason="the model is built with torch")
def test_a_model_of_a_repository_is_run_before_its_first_request(tiny_bundle: Path, tmp_path: Path) -> None:
    """And what it may keep for further requests counts as memory that it takes."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_bundle)
    options = ["--repository", str(tmp_path / "models"), "--warm-up", "--address", "127.0.0.1:0", "--threads", "1"]
    options += ["--models-memory", "2GiB", "--prefix-cache", f"{ROOM >> 20}MiB", "--picture-cache", "0"]
    command = [sys.executable, "-m", "serving.cli.commands", "serve", *options]
    log = tmp_path / "server.log"
    with (
        log.open("w") as written,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=written, text=True) as server,
    ):
        assert server.stdout is not None
        try:
            address = server.stdout.readline().split()[-1]
            with Client(address, "tiny", timeout=60) as client:
                (before,) = client.models()
                assert before.state == model_pb2.MODEL_STATE_UNLOADED and "warming up" not in log.read_text()
                assert client.chat("what is it?", max_tokens=2).completion_tokens == 2
                (after,) = client.models()
        finally:
            server.terminate()
        assert server.wait(20) == 0
    assert log.read_text().count("warming up took") == 1
    assert ROOM < after.memory_bytes["cpu"] < 2 << 30
