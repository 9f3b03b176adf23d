"""Real signals in every long step of a build and of a capture: an end within seconds, its exit code, its message,
nothing half written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, signal, sys, time
import export.cli.commands, export.build.build, export.build.calibrate, export.report.console
from pathlib import Path
from tests.conftest import link_graphs

source, folder, cache = sys.argv[1], Path(sys.argv[2]), Path(os.environ["ENGINECAST_CACHE"])
STAGES = [
    ("build", "trace", "TERM"), ("build", "calibrate", "INT"), ("build", "write", "INT"),
    ("build", "compile onnxruntime", "TERM"), ("build", "quality", "INT"), ("calibrate", "capture", "TERM"),
]

def run(command, stage, told):
    def show(report):
        if report.step.stage == stage and report.seconds is None:
            os.write(told, b"x")
            time.sleep(0.01)
    export.cli.commands.show = show
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    output = folder / "out" / ("b" if command == "build" else "s.safetensors")
    sys.argv = ["enginecast", command, source, "--output", str(output)]
    if command == "build":
        sys.argv += ["--quant", "int8", "--target", "onnxruntime", "--speed", "none", "--allow-low-quality"]
    export.cli.commands.main()

found = []
for command, stage, name in STAGES:
    if stage == "calibrate":  # no stage from here on needs to trace
        link_graphs(Path(sys.argv[3]), cache)
    (folder / "out").mkdir(exist_ok=True)
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        run(command, stage, told)
    os.close(told)
    assert os.read(heard, 1), (stage, (folder / "errors").read_text())
    start = time.monotonic()
    os.kill(child, getattr(signal, f"SIG{name}"))
    _, status = os.waitpid(child, 0)
    took = time.monotonic() - start
    os.close(heard)
    left = True
    while left and time.monotonic() - start < 30:
        left = [*(folder / "out").iterdir(), *cache.rglob(f"*.{child}*")]
        time.sleep(0.05)
    errors = (folder / "errors").read_text()
    found.append([command, stage, name, os.waitstatus_to_exitcode(status), took, errors, [str(path) for path in left]])
print(json.dumps(found))
"""


@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children share one import of the libraries")
@pytest.mark.usefixtures("tiny_bundle")
def test_signals(tiny_vlm: Path, tmp_path: Path, build_cache: Path) -> None:
    environment = os.environ | {"ENGINECAST_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tiny_vlm), str(tmp_path), str(build_cache)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=580,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    for name, stage, end, code, took, errors, left in json.loads(ended.stdout):
        result = (
            "nothing was written"
            if name == "build"
            else "what was captured is kept, and the same command goes on from there"
        )
        word = {"INT": "interrupted", "TERM": "terminated"}[end]
        assert (stage, code, errors) == (stage, {"INT": 130, "TERM": 143}[end], f"enginecast: {word}: {result}\n")
        assert took < 5 and not left, (stage, took, left)
    assert list((tmp_path / "cache").glob("calibrate-*/requests")), "requests that are done are kept"
