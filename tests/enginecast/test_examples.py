"""The Python examples, each in a process of its own, on the sample models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fakes.serving import FakeServer

EXAMPLES = Path(__file__).parents[2] / "examples" / "python"
PROMPT = "a large red circle at the top left on a white background"


def run(example: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_draw_and_ask(diffusion_bundle: Path, vlm_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    assert run("draw.py", diffusion_bundle, PROMPT, "--seed", 1, "--out", out) == f"{out}: 128x128, seed 1\n"
    with Image.open(out) as picture:
        red, green, blue = np.asarray(picture)[:64, :64].reshape(-1, 3).astype(int).T
    assert ((red > green + 80) & (red > blue + 80)).sum() > 300, "much of the top left is red"
    assert run("ask.py", vlm_bundle, out, "what color is the circle?").split()[0] == "red"


def test_ask_a_server(server: FakeServer, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    said = run("ask.py", "talk", tmp_path / "p.png", "what?", "--address", server.address)
    assert said.startswith("a red círcle\n(3 tokens in ")


@pytest.mark.parametrize(("steps", "seconds", "last"), [(2, 60, "picture.png"), (1000, 1.5, "cancelled after 1.5 s")])
def test_cancel(diffusion_bundle: Path, tmp_path: Path, steps: int, seconds: float, last: str) -> None:
    said = run(
        "cancel.py", diffusion_bundle, PROMPT, "--steps", steps, "--seconds", seconds, "--out", tmp_path / "picture.png"
    )
    lines = said.splitlines()
    assert lines[0].startswith("step 1 of ") and lines[-1].endswith(last) and len(lines) < 1000
