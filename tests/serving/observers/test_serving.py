"""`enginecast serve` with all that it can report, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from serving.dialects.grpc.client import Client
from tests.fakes.serving import bundle, request

PROGRAM = """
import runtime.placing.loading, serving.cli.commands
from tests.fakes.serving import FakeModel
runtime.placing.loading.begin_model = lambda *_: FakeModel()
serving.cli.commands.main()
"""


def test_a_server_with_metrics_traces_and_a_log_of_json(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", str(bundle(tmp_path, "draw").root), "--address", "127.0.0.1:0"]
    options = ["--metrics", "127.0.0.1:0", "--log-format", "json", "--traces", "http://127.0.0.1:9"]
    with subprocess.Popen([*command, *options], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        metrics, address, _ = (process.stdout.readline().split() for _ in range(3))
        with Client(address[-1]) as client:
            list(client.generate(request(steps=1)))
        with urllib.request.urlopen(f"http://{metrics[-1]}", timeout=10) as response:
            assert b'enginecast_pictures_total{model="draw"} 1.0' in response.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [line["model"] for line in lines if line["logger"] == "enginecast.requests"] == ["draw"]
