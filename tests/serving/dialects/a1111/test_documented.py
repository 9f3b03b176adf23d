"""The examples of docs/clients.md, run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from runtime.diffusion.infotext import KEY
from tests.fakes.proofs import PAGE
from tests.fakes.serving import until
from tests.serving.dialects.a1111.conftest import Studio

SECTION = PAGE.read_text().partition("\n## Automatic1111")[2].partition("\n<!-- fields")[0]
PORT = "127.0.0.1:11434"


def commands(studio: Studio) -> list[list[str]]:
    """The curl commands of the page, for this server."""
    lines = SECTION.replace("\\\n", " ").replace(PORT, f"127.0.0.1:{studio.server.port}").splitlines()
    return [["curl", "--silent", *shlex.split(line)[1:]] for line in lines if line.strip().startswith("curl ")]


def run(command: list[str], folder: Path) -> Any:
    done = subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=20)
    return json.loads(done.stdout) if done.stdout else None


def test_curl(studio: Studio, tmp_path: Path) -> None:
    models, draw, long, progress, interrupt = commands(studio)
    assert run(models, tmp_path)[0]["title"] == "draw"
    run(draw, tmp_path)
    assert len(json.loads((tmp_path / "drawn.json").read_bytes())["images"]) == 1
    assert (studio.requests[-1].sampler, studio.requests[-1].seed) == ("dpmpp_2m_karras", 7)
    studio.fake.draw.engine.calls.clear()
    studio.fake.draw.hold()
    with subprocess.Popen(long, stdout=subprocess.PIPE) as drawing:
        until(lambda: studio.fake.draw.calls == 1)
        assert run(progress, tmp_path)["state"]["id_task"] == "cat"
        assert run(interrupt, tmp_path) == {}
        studio.fake.draw.release()
        content = json.loads(drawing.communicate(timeout=20)[0])
    assert content["images"] == [] and json.loads(content["info"])["interrupted"]


def test_the_client_library(studio: Studio, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"((?:^    .*\n|^\n)+)", SECTION[SECTION.index("    from webuiapi") :], re.MULTILINE)[:1]
    code = "\n".join(line[4:] for line in block.splitlines()).replace("11434", str(studio.server.port))
    exec(compile(code, str(PAGE), "exec"), {})  # the page's own example
    assert (tmp_path / "circle.png").stat().st_size and "Seed: 7" in capsys.readouterr().out and KEY
