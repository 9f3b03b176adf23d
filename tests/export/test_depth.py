"""Pictures of depth, by small ONNX models of every layout that is read, against transformers' processor."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from transformers import DPTImageProcessorPil

import serving.cli.commands
from export.depth import DepthModel
from runtime.errors import EngineError, NotFound, SourceError, UnsupportedModel
from runtime.vision.images import Picture

Shape = Sequence[int | str]
OPEN: Shape = ("batch", 3, "height", "width")
PICTURE: Picture = np.random.default_rng(0).integers(0, 255, (30, 42, 3), dtype=np.uint8)


def model(file: Path, given: Shape = OPEN, found: Shape = ("batch", "rows", "columns"), kind: int = 1) -> Path:
    """A model that gives the mean of the colors, of half the height and width; with three channels, the colors."""
    keep, colors = len(found) == 4, found[1] == 3
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ReduceMean", ["pooled", "axes"], ["mean"], keepdims=int(keep)),
        helper.make_node("Identity", ["pooled" if colors else "mean"], ["predicted_depth"]),
    ]
    graph = helper.make_graph(
        nodes, "depth", [helper.make_tensor_value_info("pixel_values", kind, given)],
        [helper.make_tensor_value_info("predicted_depth", kind, found)],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    return file


def expected(processor: Any, picture: Picture) -> Picture:
    """What transformers' depth-estimation pipeline makes of a model's output."""
    pixels = torch.from_numpy(np.asarray(processor(Image.fromarray(picture), return_tensors="np")["pixel_values"]))
    depth = torch.nn.functional.avg_pool2d(pixels, 2).mean(1, keepdim=True)
    depth = torch.nn.functional.interpolate(depth, picture.shape[:2], mode="bicubic", align_corners=False)[0, 0]
    return ((depth - depth.min()) / (depth.max() - depth.min()) * 255).numpy().astype(np.uint8)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 56, "width": 56}, "keep_aspect_ratio": True, "ensure_multiple_of": 14},
        {"size": {"height": 24, "width": 32}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
    ],
)
@pytest.mark.parametrize("found", [("batch", "rows", "columns"), (1, 1, "rows", "columns")])
def test_equals_transformers(tmp_path: Path, settings: dict[str, Any], found: Shape) -> None:
    """Its settings are those of the file beside the model, or in the folder above it."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    grey = DepthModel.open(model(tmp_path / "onnx" / "model.onnx", found=found))(PICTURE)
    wanted = expected(DPTImageProcessorPil(**settings), PICTURE)
    assert grey.shape == PICTURE.shape and grey.dtype == np.uint8 and (grey == grey[..., :1]).all()
    assert np.abs(grey[..., 0].astype(int) - wanted).max() <= 1 and wanted.std() > 20


def test_what_is_near_is_bright_and_sizes_of_the_file_count(tmp_path: Path) -> None:
    near = np.zeros((20, 20, 3), np.uint8)
    near[:, 10:] = 200
    one = DepthModel.open(model(tmp_path / "fixed.onnx", (1, 3, 8, 16), (1, 4, 8)), mean=(0, 0, 0), std=(1, 1, 1))
    assert one._pixels(near).shape == (1, 3, 8, 16) and one._pixels(near).max() == pytest.approx(200 / 255, rel=0.02)
    grey = one(near)
    assert grey[:, -1].min() > 220 and grey[:, 0].max() < 30
    assert not one(np.zeros((8, 8, 3), np.uint8)).any(), "a flat picture is black"


def test_half_precision(tmp_path: Path) -> None:
    half = DepthModel.open(model(tmp_path / "half.onnx", kind=TensorProto.FLOAT16), edge=56)(PICTURE)
    full = DepthModel.open(model(tmp_path / "full.onnx"), edge=56)(PICTURE)
    assert np.abs(half.astype(int) - full).max() <= 2


@pytest.mark.parametrize(
    ("given", "found", "message"),
    [
        (("batch", 1, 8, 8), ("batch", 4, 4), r"reads pixel_values tensor\(float\) \['batch', 1, 8, 8\], expected one"),
        ((2, 3, 8, 8), (2, 4, 4), r"reads pixel_values tensor\(float\) \[2, 3, 8, 8\], expected one input, float \[1"),
        (OPEN, ("batch", 3, "rows", "columns"), r"gives predicted_depth .* 3, 'rows', .*expected float \[1, height"),
    ],
)
def test_models_of_other_shapes_are_refused(tmp_path: Path, given: Shape, found: Shape, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        DepthModel.open(model(tmp_path / "a.onnx", given, found))


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"gone.onnx does not exist: expected an ONNX file"):
        DepthModel.open(tmp_path / "gone.onnx")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(SourceError, match=r"a.onnx cannot be read by ONNX Runtime"):
        DepthModel.open(tmp_path / "a.onnx")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 5}, "do_pad": True}))
    with pytest.raises(SourceError, match=r"cannot be followed: size.height: Field required; .*do_pad"):
        DepthModel.open(model(tmp_path / "a.onnx"))


def test_numbers_that_are_none_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="gave NaN or infinite depths"):
        DepthModel.open(model(tmp_path / "a.onnx"), edge=28, std=(2e-39,) * 3)(PICTURE)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["enginecast", "preprocess", "depth", *arguments])
        with pytest.raises(SystemExit) as ended:
            serving.cli.commands.main()
        return ended.value.code, capfd.readouterr().err

    file, picture, out = model(tmp_path / "model.onnx"), tmp_path / "a.png", tmp_path / "depth.png"
    Image.fromarray(PICTURE).save(picture)
    usual = str(picture), "--model", str(file), "--out", str(out)
    assert run(*usual, "--edge", "42", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")[0] == 0
    wanted = DepthModel.open(file, 42, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(PICTURE)
    assert (np.asarray(Image.open(out)) == wanted).all()
    assert run(*usual, "--mean", "1,2") == (
        2, "enginecast: mean: is '1,2', expected three numbers R,G,B such as 0.5,0.5,0.5\n",
    )  # fmt: skip
    assert run(*usual, "--std", "0,1,1") == (
        2, "enginecast: std: is '0,1,1', expected finite numbers, above 0\n",
    )  # fmt: skip
    assert run(str(picture), "--model", str(tmp_path / "gone.onnx"), "--out", str(out))[0] == 3
