"""Files of drawn pictures."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import InvalidInput, NotFound
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import decode_image, encode_image
from serving.page.pictures import KEPT_SECONDS, fields_of, parameters, saved

PICTURE = np.full((8, 16, 3), (1, 2, 3), np.uint8)


def test_a_drawn_picture_says_how_it_was_drawn(tmp_path: Path) -> None:
    request = ImageRequest("a red círcle", negative_prompt="blurry", steps=5, guidance_scale=2.5, sampler="euler")
    path, text = saved(tmp_path, request, ImageReady(PICTURE, 0, 7), {"Model": "shapes"})
    assert (decode_image(path.read_bytes()) == PICTURE).all()
    assert parameters(path) == text
    found = fields_of(text)
    wanted = {"prompt": "a red círcle", "negative_prompt": "blurry", "steps": 5, "guidance_scale": 2.5}
    wanted |= {"sampler": "euler", "seed": 7, "width": 16, "height": 8}
    assert {name: found[name] for name in wanted} == wanted
    assert "Model: shapes" in text


def test_files_of_yesterday_are_removed(tmp_path: Path) -> None:
    old, _ = saved(tmp_path, ImageRequest("a"), ImageReady(PICTURE, 0, 1), {})
    os.utime(old, (old.stat().st_atime, old.stat().st_mtime - KEPT_SECONDS - 1))
    new, _ = saved(tmp_path, ImageRequest("a"), ImageReady(PICTURE, 0, 2), {})
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


def test_pictures_without_parameters(tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    plain.write_bytes(encode_image(PICTURE))
    with pytest.raises(InvalidInput, match="has no parameters"):
        parameters(plain)
    plain.write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match="is no PNG"):
        parameters(plain)
    with pytest.raises(NotFound, match="upload it again"):
        parameters(tmp_path / "none.png")
    with pytest.raises(InvalidInput, match="are empty"):
        fields_of(" ")
