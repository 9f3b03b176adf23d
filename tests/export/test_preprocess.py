"""What control networks are shown."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import serving.cli.commands
from export.preprocess import canny


def test_edges_are_white_and_only_where_colors_change() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[8:24, 8:24] = 255
    edges = canny(picture)
    assert edges.shape == picture.shape and edges.dtype == np.uint8 and set(np.unique(edges)) == {0, 255}
    assert not edges[12:20, 12:20].any() and not edges[:6].any()
    assert edges[12:20, 6:10].any(axis=1).all() and edges[12:20, 22:26].any(axis=1).all()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["enginecast", "preprocess", "canny", *arguments])
        with pytest.raises(SystemExit) as ended:
            serving.cli.commands.main()
        return ended.value.code, capfd.readouterr().err

    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    source, out = tmp_path / "a.png", tmp_path / "edges.png"
    Image.fromarray(picture).save(source)
    assert run(str(source), "--out", str(out))[0] == 0
    assert (np.asarray(Image.open(out)) == canny(picture)).all()
    assert run(str(source), "--out", str(out), "--low", "300") == (
        2, "enginecast: low: is 300, expected at most --high, 200\n",
    )  # fmt: skip
    assert run(str(tmp_path / "gone.png"), "--out", str(out))[0] == 3
