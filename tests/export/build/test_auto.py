"""The search over whole models: what is tried, what is taken, and what a bundle says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from calibration.quantize.plan import LayerPlan
from calibration.quantize.tuning import Tuning
from calibration.search.approximate import LEAST
from calibration.search.search import Assignment
from calibration.search.sensitivity import Board
from export.build import auto
from export.build.build import build
from export.build.options import Options
from export.graph import weights as graph
from export.graph.trace import trace
from export.report import quality
from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import BATCH, Signature, Tensor
from runtime.errors import NotFound, QualityError
from runtime.placing.loading import load_model

SIGNATURE = Signature(
    inputs=(Tensor(name="x", dtype="float32", dims=(BATCH, 8, 64)),),
    outputs=(Tensor(name="y", dtype="float32", dims=(BATCH, 8, 64)),),
)


def layer(kind: Any) -> LayerPlan:
    return LayerPlan("n", "MatMul", "w", 4096, kind, 64 if kind == "int4" else 0, False)


def submodel() -> auto.Submodel:
    points = [
        Assignment((layer(kind),), cost, noise, noise)
        for kind, cost, noise in (("int8", 0.5, 1e-4), ("int4", 0.3, 1e-2))
    ]
    return auto.Submodel(points, 40.0, auto.Explored(method="measured", runs=2))


class Judge:
    """Does every case right that is no multiple of what the weight type says, and counts what it was asked."""

    def __init__(self, **wrong: int) -> None:
        self.wrong, self.done, self.closed = wrong, Counter[str](), 0

    def __call__(self, plans: auto.Plans | None, first: int) -> Generator[bool, None, None]:
        kind = plans["a"][0].weight_type if plans else "float"
        try:
            for number in count(first):
                self.done[kind] += 1
                yield not self.wrong.get(kind) or number % self.wrong[kind] != 0
        finally:
            self.closed += 1


def exam(judge: Judge, key: str, cases: int = auto.CASES) -> auto.Exam:
    return auto.Exam(judge, key, cases)


def test_the_cheapest_that_is_surely_within_is_taken() -> None:
    judge = Judge(int4=20)
    for most, kind, taken in ((1.0, "int8", 1), (8.0, "int4", 0)):
        with closing(exam(judge, f"surely-{most}")) as asked:
            plans, found = auto.search({"a": submodel()}, "size", most, asked)
        assert plans["a"][0].weight_type == kind and found.chosen == taken and found.unit == "points"
        point = found.points[taken]
        assert point.drop <= most and point.sure is not None and point.sure >= auto.SURE
        assert f"within {most:g} with" in found.claim and "NOT" not in found.claim
    assert [point.cost for point in found.points] == [0.3], "what costs more need not be tried"
    assert found.submodels == {"a": auto.Explored(method="measured", runs=2)}
    assert judge.closed == 5, "float, int4 and int8; then float and int4"


def test_cases_are_added_until_it_is_sure() -> None:
    judge = Judge(int4=4)
    _, found = auto.search({"a": submodel()}, "size", 1.0, exam(judge, "until"))
    far, near = found.points
    assert (far.cases, far.drop, far.sure) == (100, 25.0, pytest.approx(0, abs=1e-6)), "25 points are seen at once"
    assert near.cases > 100 and near.drop == 0 and near.resolution is not None and near.resolution < 1


def test_what_cannot_be_told_is_not_claimed() -> None:
    _, found = auto.search({"a": submodel()}, "size", 1.0, exam(Judge(), "few", cases=100))
    point = found.points[found.chosen]
    assert len(found.points) == 2 and point.cost == 0.3, "neither is sure: the cheaper of equals"
    assert point.drop == 0 and point.sure is not None and 0.5 < point.sure < auto.SURE
    assert "NOT certain" in found.claim and f"tell {point.resolution:.1f} points apart" in found.claim


def test_what_models_did_is_kept() -> None:
    judge, again = Judge(int4=20), Judge(int4=20)
    first = auto.search({"a": submodel()}, "size", 1.0, exam(judge, "kept"))
    assert auto.search({"a": submodel()}, "size", 1.0, exam(again, "kept")) == first and not again.done
    more = auto.search({"a": submodel()}, "size", 5.0, exam(again, "kept"))
    done = more[1].points[0].cases
    known = first[1].points[0].cases
    assert again.done["int4"] == max(0, done - known), "goes on after the cases that are known"


def test_without_a_score_the_drop_is_against_int8() -> None:
    plans, found = auto.search({"a": submodel()}, "size", 19.0, None)
    assert plans["a"][0].weight_type == "int8" and found.unit == "dB"
    assert [round(point.drop) for point in found.points] == [20, 0] and found.points[0].sure is None
    assert found.claim == "+0.0 dB below int8, on 6 captured calls of each submodel at most"
    assert auto.search({"a": submodel()}, "size", 20.5, None)[0]["a"][0].weight_type == "int4"


def test_nothing_within_the_drop_is_an_error() -> None:
    with pytest.raises(QualityError, match=r"drop of 0\.1.*drops 50\.0.*--max-drop"):
        auto.search({"a": submodel()}, "size", 0.1, exam(Judge(int4=2, int8=2), "nothing"))


# Exploring


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written float graph of six layers."""
    torch.manual_seed(0)
    module = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(64, 64), nn.ReLU())))
    values = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = module

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.all(x),)

    model = trace(Chain().eval().to("meta"), SIGNATURE)
    for name, array in values.items():
        model.graph.initializers[f"all.{name}"].const_value = ir.tensor(array, name=f"all.{name}")
    folder = tmp_path_factory.mktemp("chain") / "graph"
    graph.write(model, folder)
    return folder / graph.MODEL


def explore(path: Path, key: str, nbytes: int = 0, goal: Any = "size") -> auto.Submodel:
    samples = [SIGNATURE.sample({"batch": 2}, seed) for seed in range(8)]
    return auto.Submodel.explore(ir.load(path), False, Tuning(), samples, goal, nbytes, key)


def test_small_submodels_are_measured_and_big_ones_approximated(chain: Path) -> None:
    small, big = explore(chain, "sizes"), explore(chain, "sizes", auto.MEASURED_BYTES + 1)
    assert small.how == auto.Explored(method="measured", runs=12) and big.how.method == "approximated"
    assert big.how.runs == LEAST
    assert small.int8_db == big.int8_db
    best = {found.cost: found.snr_db for found in small.assignments}
    assert (
        all(found.snr_db <= best.get(found.cost, 300) + 1e-6 for found in big.assignments) and len(big.assignments) > 2
    )


def test_explored_once(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = explore(chain, "once")
    speed = explore(chain, "once", goal="speed")
    assert speed.how == first.how, "what each layer does is known: only assignments are measured"
    monkeypatch.setattr(auto, "Board", None)
    assert explore(chain, "once") == first


UNDER_WAY = """
import sys, time
from pathlib import Path
from tests.export.build.test_auto import explore
from calibration.search.sensitivity import Board
alone, done = Board._alone, []
def measure(board, index, number):
    if len(done) == 5:
        print("ready", flush=True)
        time.sleep(60)
    done.append(index)
    return alone(board, index, number)
Board._alone = measure
explore(Path(sys.argv[1]), "killed")
"""


def test_a_killed_exploration_goes_on(chain: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = explore(chain, "unbroken")
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", UNDER_WAY, str(chain)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.kill()
    assert process.returncode == -9
    (folder,) = (path for path in own_cache.glob("explore-*") if not (path / "noises.npy").exists())
    assert len(list(folder.glob("layer-*.npy"))) == 5
    calls, alone = list[int](), Board._alone

    def measure(board: Board, index: int, number: int) -> Any:
        calls.append(index)
        return alone(board, index, number)

    monkeypatch.setattr(Board, "_alone", measure)
    assert explore(chain, "killed") == unbroken
    assert len(calls) == 12 - 5
    assert not list(folder.glob("layer-*")), "what is in noises.npy is not kept twice"


def test_a_killed_approximation_goes_on(chain: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken, size = explore(chain, "probed", auto.MEASURED_BYTES + 1), auto.MEASURED_BYTES + 1
    calls, change = list[int](), Board.change

    def stop(board: Board, errors: Any) -> Any:
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(1)
        return change(board, errors)

    monkeypatch.setattr(Board, "change", stop)
    with pytest.raises(KeyboardInterrupt):
        explore(chain, "stopped", size)
    calls.clear()
    monkeypatch.setattr(Board, "change", lambda board, errors: calls.append(1) or change(board, errors))
    assert explore(chain, "stopped", size) == unbroken and len(calls) == LEAST - 7
    assert not list(own_cache.glob("explore-*/probe-*"))


# Whole builds


def test_a_build_searches_once_and_says_what_it_found(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(str(tiny_vlm), tmp_path / "b", quant="auto", max_drop=6.0, goal="speed")
    bundle, _ = build(options)
    bundle.verify()
    found = json.loads((bundle.root / auto.FILE).read_bytes())
    assert found["goal"] == "speed" and found["unit"] == "dB" and found["points"][found["chosen"]]["drop"] <= 6
    assert {explored["method"] for explored in found["submodels"].values()} == {"measured"}
    assert not (bundle.root / "trial").exists()
    load_model(bundle.root).close()
    monkeypatch.setattr(auto, "Board", None)  # nothing can be measured
    again, _ = build(replace(options, output=tmp_path / "again"))
    assert json.loads((again.root / auto.FILE).read_bytes()) == found


def test_below_the_floors_there_is_no_bundle(tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = tuple(
        floor.model_copy(update={"least": 250.0}) for floor in quality.FLOORS if floor.measure == quality.SNR
    )
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
