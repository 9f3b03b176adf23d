"""The search over whole models: what is tried, what is taken, and what a bundle says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.quantize import LayerPlan
from calibration.search import Assignment
from export import auto, quality
from export.build import Options, build
from runtime.bundle import Bundle
from runtime.errors import NotFound, QualityError
from runtime.loading import load_model


class Known:
    """A board that knows the noise of plans by their weight type."""

    def choice(self, plans: Any) -> Any:
        return plans

    def noise(self, plans: Any) -> float:
        return {"float": 1e-9, "int8": 1e-4, "int4": 1e-2}[plans[0].weight_type]


def layer(kind: Any) -> LayerPlan:
    return LayerPlan("n", "MatMul", "w", 4096, kind, 64 if kind == "int4" else 0, False)


def submodel() -> auto.Submodel:
    board: Any = Known()
    points = [Assignment((layer(kind),), cost, noise, noise) for kind, cost, noise in (("int8", 0.5, 1e-4), ("int4", 0.3, 1e-2))]
    return auto.Submodel(board, (layer("int8"),), points)


def test_the_cheapest_within_the_drop_is_taken() -> None:
    drops = {"int8": 0.5, "int4": 3.0}
    for most, kind in ((1.0, "int8"), (3.0, "int4")):
        plans, found = auto.search({"a": submodel()}, "size", most, lambda tried: drops[tried["a"][0].weight_type])
        assert plans["a"][0].weight_type == kind and found.points[found.chosen].drop <= most and found.unit == "points"
    assert [point.drop for point in found.points] == [0.5, 3.0], "equal assignments are tried once"


def test_without_a_score_the_drop_is_against_int8() -> None:
    plans, found = auto.search({"a": submodel()}, "size", 19.0, None)
    assert plans["a"][0].weight_type == "int8" and found.unit == "dB"
    assert [round(point.drop) for point in found.points] == [0, 20]
    assert auto.search({"a": submodel()}, "size", 20.5, None)[0]["a"][0].weight_type == "int4"


def test_nothing_within_the_drop_is_an_error() -> None:
    with pytest.raises(QualityError, match=r"drop of 0\.1.*drops 2\.0.*--max-drop"):
        auto.search({"a": submodel()}, "size", 0.1, lambda tried: 2.0)


def test_a_build_searches_and_says_what_it_found(tiny_vlm: Path, tmp_path: Path) -> None:
    bundle, _ = build(Options(str(tiny_vlm), tmp_path / "b", quant="auto", max_drop=6.0, goal="speed"))
    bundle.verify()
    found = json.loads((bundle.root / auto.FILE).read_bytes())
    assert found["goal"] == "speed" and found["unit"] == "dB" and found["points"][found["chosen"]]["drop"] <= 6
    assert not (bundle.root / "trial").exists()
    load_model(bundle.root).close()


def test_below_the_floors_there_is_no_bundle(tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = tuple(floor.model_copy(update={"least": 250.0}) for floor in quality.FLOORS if floor.measure == "submodel_snr_db")
    monkeypatch.setattr(quality, "FLOORS", strict)
    with pytest.raises(QualityError, match=r"falls below.*vision_encoder.*No bundle was written"):
        build(Options(str(tiny_vlm), tmp_path / "b", quant="int8"))
    assert not (tmp_path / "b").exists()
    bundle, _ = build(Options(str(tiny_vlm), tmp_path / "b", quant="int8", allow_low_quality=True))
    assert any("vision_encoder" in fault for fault in quality.load_quality(bundle).shortfalls("int8"))


def test_quality_can_be_left_out(tiny_vlm: Path, tmp_path: Path) -> None:
    bundle, timings = build(Options(str(tiny_vlm), tmp_path / "b", quant="int8", quality="none"))
    assert "quality" not in timings and isinstance(bundle, Bundle)
    with pytest.raises(NotFound, match="no quality report"):
        quality.load_quality(bundle)
