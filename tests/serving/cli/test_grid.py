"""`enginecast grid`: cells like single pictures, one labelled page, going on after an interruption."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import enginecast
from runtime.diffusion.infotext import KEY
from runtime.grid.picture import grid_picture
from runtime.grid.plan import GridPlan
from runtime.tasks.image import ImageRequest
from serving.cli import commands as cli
from tests.fakes.painting import painted, painting
from tests.fakes.serving import until

ROOT = Path(__file__).parents[3]
AXES = ("--x", "steps=1,2", "--y", "prompt_sr=red,blue", "--z", "guidance_scale=3,7")
GIVEN = ("--model", "draw", "--prompt", "a red circle", "--seed", "7", *AXES)


def grid(address: str, out: Path, *arguments: str, code: int = 0) -> Any:
    ended = CliRunner().invoke(cli.app, ["grid", "--address", address, "--out", str(out), *arguments])
    assert (ended.exit_code or 0) == code or ended.exception is not None, ended.output
    return ended


def expected() -> Any:
    axes: Any = {"x": ("steps", "1,2"), "y": ("prompt_sr", "red,blue"), "z": ("guidance_scale", "3,7")}
    plan = GridPlan.of(ImageRequest("a red circle", seed=7), axes)
    return grid_picture(plan, [painted(cell) for cell in plan.cells])


def test_a_grid_of_three_axes(tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    with painting(tmp_path / "bundles") as (server, painter):
        assert grid(server.address, out, *GIVEN).output.splitlines()[-1] == str(out)
        assert len(painter.requests) == 8
        with Image.open(out) as file:
            np.testing.assert_array_equal(np.asarray(file), expected())
            text = file.info[KEY]
        assert text.startswith("a red circle\nSeed: 7, Size: 16x8, Script: X/Y/Z plot, X Type: steps, X Values: ")
        cells = sorted((tmp_path / "grid.cells").iterdir())
        assert len(cells) == 8
        with Image.open(cells[0]) as file:
            assert "Seed: 7" in file.info[KEY] and "circle" in file.info[KEY]

        again = grid(server.address, out, *GIVEN)
        assert len(painter.requests) == 8 and f"8 of 8 cells are in {tmp_path / 'grid.cells'}" in again.output
        grid(server.address, out, *GIVEN[:-1], "guidance_scale=3,9")
        assert len(painter.requests) == 12, "only the cells that are new"
        cells[0].write_bytes(b"no picture")
        broken = grid(server.address, out, *GIVEN)
        assert "Remove it, and it is drawn again" in str(broken.exception) and str(cells[0]) in str(broken.exception)


def test_without_a_seed_it_is_found_again(tmp_path: Path) -> None:
    given = [one for one in GIVEN if one not in ("--seed", "7")]
    with painting(tmp_path / "bundles") as (server, painter):
        for _ in range(2):
            grid(server.address, tmp_path / "a.png", *given)
        assert len(painter.requests) == 8 and len({request.seed for request in painter.requests}) == 1
        grid(server.address, tmp_path / "a.png", *given, "--eta", "0.5")
        assert len({request.seed for request in painter.requests}) == 2


def test_killed_and_run_again_it_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    with painting(tmp_path / "bundles") as (server, painter):
        painter.hold()
        command = [
            sys.executable,
            "-m",
            "serving.cli.commands",
            "grid",
            "--address",
            server.address,
            "--out",
            out,
            *GIVEN,
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        painter.let(1 + 2 + 1 + 1)  # of the cells with one step and with two in turn: three, and half of the fourth
        until(lambda: len(painter.requests) == 4 and painter.calls == 6, 30)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = sorted((tmp_path / "grid.cells").glob("*"))
        assert len(kept) == 3 and not out.exists()
        times = {file: file.stat().st_mtime_ns for file in kept}
        painter.release()
        assert "3 of 8 cells are in" in grid(server.address, out, *GIVEN).output
        assert len(painter.requests) == 4 + 5
        assert {file: file.stat().st_mtime_ns for file in kept} == times
    with Image.open(out) as file:
        np.testing.assert_array_equal(np.asarray(file), expected())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "x: is missing: a grid has one axis at least"),
        (("--x", "stps=1"), "did you mean 'steps'"),
        (("--x", "steps=0,1"), "steps: is 0, expected 1 to 1000"),
        (("--x", "steps=1-20", "--y", "seed=1-20"), "grid: has 400 cells, expected at most 100"),
        (("--x", "prompt_sr=green,blue"), "x: searches for 'green'"),
    ],
)
def test_a_mistake_ends_before_any_work(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    given = ("--model", "draw", "--prompt", "a red circle", *arguments)
    ended = grid("127.0.0.1:1", tmp_path / "grid.png", *given, code=1)
    assert message in str(ended.exception) and not list(tmp_path.iterdir())


def test_from_python(tmp_path: Path) -> None:
    with painting(tmp_path / "bundles") as (server, painter), enginecast.Client(server.address, "draw") as client:
        found = client.grid("a red circle", x=("steps", [1, 2]), folder=tmp_path / "cells")
        assert found.plan.shape == (2, 1, 1)
        for cell, request in zip(found.cells, found.plan.cells, strict=True):
            np.testing.assert_array_equal(cell, painted(request))
            alone = client.generate("a red circle", steps=request.steps, seed=request.seed)
            np.testing.assert_array_equal(cell, alone.image)
        begun = len(painter.requests)
        again = client.grid("a red circle", x=("steps", "1-2"), folder=tmp_path / "cells")
        assert len(painter.requests) == begun
        np.testing.assert_array_equal(again.image, found.image)
        path = found.save(tmp_path / "grid.png")
        with Image.open(path) as file:
            np.testing.assert_array_equal(np.asarray(file), found.image)
            assert "X Type: steps" in file.info[KEY]
        with pytest.raises(enginecast.InvalidInput, match="x: 'images' cannot be on an axis"):
            client.grid("a", x=("images", [1]))
