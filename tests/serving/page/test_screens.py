"""The screenshots of docs/page.md, with the samples: `ENGINECAST_SCREENS=docs/page pytest -m full` on this file writes
them anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving.page.conftest import Opened

pytestmark = pytest.mark.full
PROMPT = "a large red circle on the left and a small blue square on the right on a white background"
LARGEST = 150_000
"""Bytes of a screenshot."""


@pytest.fixture(scope="module")
def url(diffusion_bundle: Path, vlm_bundle: Path) -> Iterator[str]:
    """The page of both samples, as `enginecast ui` serves it."""
    command = [sys.executable, "-m", "serving.cli.commands", "ui", str(diffusion_bundle), str(vlm_bundle)]
    with subprocess.Popen([*command, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found, ready = "", 0
        for line in server.stdout:
            found = found or ((at := re.search(r"the page is at (\S+)", line)) and at[1]) or ""
            ready += " is ready on " in line
            if ready == 2:
                break
        yield found
        server.terminate()
        assert server.wait(30) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the screenshots go."""
    chosen = Path(os.environ.get("ENGINECAST_SCREENS") or tmp_path_factory.mktemp("screens"))
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def grid(opened: Opened) -> None:
    """Draw a grid, with a script beside it."""
    page = opened.page
    page.get_by_role("button", name="Grid (X/Y/Z)").click()
    for axis, field, values in (("x", "steps", "4,12"), ("y", "prompt_sr", "red,green")):
        opened.chosen(f"#draw-{axis}-field", field)
        page.fill(f"#draw-{axis}-values :is(textarea, input)", values)
    page.click("#draw-start")
    opened.says("#draw-status", "a grid of 4 cells")
    opened.seen("#draw-results")
    page.get_by_role("button", name="Scripts").click()
    opened.chosen("#draw-scripts-chosen", "styles")
    opened.says("#draw-scripts-settings", "styles:names")


@pytest.mark.parametrize(
    ("name", "scheme", "width"), [("light", "light", 1200), ("dark", "dark", 1200), ("phone", "light", 390)]
)
def test_screens(chromium: Any, url: str, folder: Path, name: str, scheme: str, width: int) -> None:
    opened = Opened(chromium, url, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page, files = opened.page, list[Path]()

    def shot(what: str, whole: bool = True) -> None:
        page.wait_for_timeout(1500)
        files.append(folder / f"{what}-{name}.png")
        page.screenshot(path=files[-1], full_page=whole)
        Image.open(files[-1]).convert("RGB").quantize(200).save(files[-1], optimize=True)

    page.set_default_timeout(90_000)  # the samples compute here
    opened.says("#draw-width", "32 to 2048")
    page.fill("#draw-prompt textarea", PROMPT)
    page.fill("#draw-seed :is(textarea, input)", "7")
    page.click("#draw-start")
    opened.says("#draw-status", "a picture in")
    opened.seen("#draw-results")
    shot("draw")
    page.locator("#draw-results").get_by_label("Zoom").click()
    page.wait_for_function("() => document.querySelector('#viewer img').naturalWidth > 0")
    shot("zoom", whole=False)
    page.keyboard.press("Escape")
    grid(opened)
    shot("grid")
    opened.tab("Gallery")
    page.locator("#album-pictures .thumbnail-item").nth(5).click()  # behind the grid and its cells
    page.wait_for_function("() => document.querySelector('#album-text textarea').value.includes('Seed: 7')")
    shot("gallery")
    page.click("#album-ask")
    opened.seen("#talk-question")
    page.fill("#talk-question textarea", "describe the picture.")
    page.keyboard.press("Enter")
    opened.says("#talk-status", "characters in")
    assert "a large red circle on the left" in page.inner_text("#talk-chat")
    shot("talk")
    opened.tab("Models")
    opened.says("#models-table", "ready")
    shot("models")
    opened.tab("Profiles")
    page.wait_for_selector("#profiles-plot canvas, #profiles-plot svg")
    shot("profiles")
    assert opened.elsewhere == []
    assert opened.faults == []
    assert all(file.stat().st_size < LARGEST for file in files)
    opened.close()
