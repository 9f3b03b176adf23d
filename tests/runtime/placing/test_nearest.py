"""Which measured figures decide: those of the nearest device and model, and nothing where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from profiles.rows import append
from runtime.bundle.manifest import Manifest, Source, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.engine import FakeEngine, Options
from runtime.errors import EngineUnavailable
from runtime.files import DATA
from runtime.placing.advice import Advice, advise
from runtime.placing.containers import Allowance
from runtime.placing.decided import Decided
from runtime.placing.devices import Device, Machine, processor
from runtime.placing.fingerprint import Fingerprint
from runtime.placing.loading import load_model
from runtime.placing.measured import Collected, Row, collect
from runtime.placing.placement import Place, Placement
from runtime.timing import Spread
from serving.cli import overview

HERE = Machine((Device("cpu", "cpu", processor()),), Allowance(8))
PRINT = Fingerprint.of(HERE)
WIDTH = Dim(name="width", min=1, opt=4, max=8)
UNET = Submodel(
    name="unet",
    signature=Signature(
        inputs=(
            Tensor(name="x", dtype="float32", dims=(BATCH, WIDTH)),
            Tensor(name="scale", dtype="float32", dims=(1,)),
        ),
        outputs=(Tensor(name="y", dtype="float32", dims=(BATCH, WIDTH)),),
    ),
    graph="onnx/unet/model.onnx",
    precision=Precision.parse("int8"),
    nbytes=1,
)
MANIFEST = Manifest(
    name="b", key="", pipeline="diffusion", task="image", quant="int8", submodels=(UNET,), config={}, versions={},
    files={}, artifacts=(), source=Source(name="s", family="f", architecture="A", fingerprint=""),
)  # fmt: skip
TARGETS = ("openvino", "onnxruntime", "tensorrt")
TWIN = PRINT.model_copy(update={"processor": PRINT.processor.model_copy(update={"name": "twin", "model": 99})})
STRANGER = PRINT.model_copy(
    update={"processor": PRINT.processor.model_copy(update={"features": (*PRINT.processor.features, "OTHER")})}
)


def row(target: str, median: float, /, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "metric": "picture", "unit": "s", "spread": Spread.of([median]), "program": "enginecast 0.1.0", "bundle": "b",
        "source": "s", "family": "f", "quant": "int8", "target": target, "device": "CPU", "cpu": processor(),
        "threads": 8, "versions": {}, "date": datetime(2026, 11, 20, tzinfo=UTC), "fingerprint": PRINT,
    }  # fmt: skip
    return Row(**fields | changes)


def pair(first: float, second: float, **changes: Any) -> list[Row]:
    """Figures of OpenVINO and ONNX Runtime."""
    return [row("openvino", first, **changes), row("onnxruntime", second, **changes)]


def advice(*rows: Row) -> Advice:
    return advise(MANIFEST, HERE, Collected(rows))


LATER = datetime(2026, 11, 21, tzinfo=UTC)
SLOWER = {"bundle": "other", "source": "t"}


@pytest.mark.parametrize(
    ("rows", "first", "words"),
    [
        ([*pair(2, 1), *pair(1, 2, fingerprint=TWIN)], "onnxruntime", "on this processor, 2026-11-20"),
        (pair(2, 1, fingerprint=TWIN, cpu="twin"), "onnxruntime", "on twin, another processor with the same instruct"),
        (pair(2, 1, fingerprint=STRANGER), "openvino", None),
        (pair(2, 1, fingerprint=PRINT.model_copy(update={"processors": 4.0})), "openvino", None),
        (pair(2, 1, fingerprint=PRINT.model_copy(update={"system": "Plan 9"})), "openvino", None),
        (pair(2, 1, fingerprint=None), "onnxruntime", "on this processor"),
        (pair(2, 1, fingerprint=None, cpu="other"), "openvino", None),
        (pair(2, 1, **SLOWER), "onnxruntime", "of t, another model of its family"),
        ([*pair(1, 2), *pair(2, 1, **SLOWER)], "openvino", "for a picture on this processor, 2026"),
        ([*pair(2, 1, **SLOWER), *pair(1, 2, fingerprint=TWIN)], "onnxruntime", "another model of its family"),
        (pair(2, 1, bundle="c", source="t", family="g"), "openvino", None),
        (pair(2, 1, bundle="c", source="t", quant="int4"), "openvino", None),
        (pair(2, 1, program="onnxruntime-genai 0.9"), "openvino", None),
        (pair(2, 1, metric="unet", unit="GOP"), "openvino", None),
        ([row("onnxruntime", 1), row("openvino", 2, fingerprint=TWIN)], "openvino", None),
        ([row("onnxruntime", 1, settings={"steps": 4}), row("openvino", 2)], "openvino", None),
        ([*pair(2, 1, run="one"), row("openvino", 0.5)], "onnxruntime", "measured 1 against 2 s"),
        ([*pair(1, 2, run="one"), *pair(2, 1, run="two", date=LATER)], "onnxruntime", "2026-11-21"),
        ([*pair(2, 1, run="one"), row("openvino", 1, threads=4, run="two", date=LATER)], "onnxruntime", "2026-11-20"),
        (pair(2, 1, metric="unet", settings={"x": "1x4", "scale": "1"}), "onnxruntime", "for a call of unet on this"),
    ],
    ids=[
        "this one before its twin", "a twin", "other instruction sets", "other threads", "another system",
        "an old row of this one", "an old row", "the family", "itself before its family",
        "the family here before itself elsewhere", "another family", "other numbers", "another program", "operations",
        "of two devices", "of two settings", "in turns", "the newer run", "a run of one",
        "a call of the largest submodel",
    ],
)  # fmt: skip
def test_the_nearest_figures_order_the_targets(rows: list[Row], first: str, words: str | None) -> None:
    found = advice(*rows)
    expected = [first, {"openvino": "onnxruntime", "onnxruntime": "openvino"}[first], "tensorrt"]
    assert found.order(TARGETS) == expected, "what was not measured keeps its position"
    decision = found.target(first, TARGETS)
    assert (decision is None) == (words is None)
    assert decision is None or (words is not None and words in decision.reason and decision.value == first)
    assert found.target("tensorrt", TARGETS) is None


def test_the_reason_says_what_was_measured() -> None:
    found = advice(*pair(3, 1.5))
    assert [found.target(name, TARGETS) for name in ("onnxruntime", "openvino")] == [
        found_of("onnxruntime", "before openvino: measured 1.5 against 3 s"),
        found_of("openvino", "behind onnxruntime: measured 3 against 1.5 s"),
    ]


def found_of(value: str, reason: str) -> Any:
    from runtime.placing.choices import Decision

    return Decision(value, f"{reason} for a picture on this processor, 2026-11-20")


def test_text_models_are_compared_by_prompt_and_answer() -> None:
    figures = {"openvino": (512.0, 32.0), "onnxruntime": (256.0, 64.0)}  # 1 + 2 s, 2 + 1 s, then a little faster
    rows = [
        row(target, value, metric=metric)
        for target, values in figures.items()
        for metric, value in zip(("prefill", "decode"), values, strict=True)
    ]
    rows.append(row("onnxruntime", 65.0, metric="decode", date=datetime(2026, 11, 21, tzinfo=UTC)))
    decision = advice(*rows).target("onnxruntime", TARGETS)
    assert decision is not None
    assert decision.reason.startswith("before openvino: measured 2.98 against 3 s for an answer of 64 tokens to 512")
    assert decision.reason.endswith("2026-11-21")


def plan(*rows: Row) -> Placement:
    return Placement({}, advice=advice(*rows), targets=TARGETS)


OPENVINO = Place("openvino", "CPU")


@pytest.mark.parametrize(
    ("rows", "asked", "expected"),
    [
        ([row("openvino", 2), row("openvino", 1, threads=4)], 0, 4),
        ([row("openvino", 2), row("openvino", 1.95, threads=4)], 0, 0),
        ([row("openvino", 2), row("openvino", 1, threads=4)], 3, 3),
        ([row("openvino", 2, threads=2), row("openvino", 1, threads=4)], 0, 0),
        ([row("openvino", 2), row("openvino", 1, threads=16)], 0, 0),
        ([row("openvino", 2), row("onnxruntime", 1, threads=4)], 0, 0),
    ],
    ids=["fewer", "little faster", "the user's", "all were not measured", "too many", "another target"],
)
def test_threads(rows: list[Row], asked: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    decided = Decided(Options(threads=asked), plan(*rows), HERE)
    assert decided.at(OPENVINO).threads == expected
    shown = decided.of(UNET, OPENVINO).get("threads")
    assert (shown is not None) == (expected == 4)
    assert shown is None or shown.reason.startswith("measured 1 s against 2 s with 8 threads for a picture")


def calls(times: Mapping[int, float], **changes: Any) -> list[Row]:
    """Timed calls with so many rows."""
    return [
        row("openvino", seconds, metric="unet", settings={"x": f"{rows}x4", "scale": "1"}, **changes)
        for rows, seconds in times.items()
    ]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.6}, "4"),
        ({2: 1.0, 4: 1.1}, "2"),
        ({1: 1.0, 2: 1.9, 4: 3.9}, "1"),
        ({1: 1.0, 4: 3.0}, "4"),
        ({1: 1.0}, None),
        ({2: 1.0, 3: 1.1}, None),
    ],
    ids=["to four", "of guided calls", "does not pay", "four alone", "no others", "no multiple"],
)
def test_how_many_calls_are_made_as_one(times: Mapping[int, float], expected: str | None) -> None:
    decided = Decided(Options(), plan(*calls(times), *calls({1: 9.0, 2: 9.0}, fingerprint=TWIN)), HERE)
    found = decided.of(UNET, OPENVINO).get("joined")
    assert (None if found is None else found.value) == expected
    engine = FakeEngine(lambda inputs: {})
    decided.tell(engine, UNET, OPENVINO)
    assert {call.shapes["x"][0]: call.seconds for call in engine.timed} == times
    assert not Decided(Options(threads=3), decided.plan, HERE).timed(UNET, OPENVINO), "measured with all threads"


@pytest.mark.parametrize("settings", [{}, {"scale": "1"}, {"x": ""}, {"x": "0x4", "scale": "1"}])
def test_rows_without_a_count_of_rows_decide_nothing(settings: Mapping[str, str]) -> None:
    odd = row("openvino", 1.0, metric="unet", settings=settings)
    decided = Decided(Options(), plan(odd, *calls({1: 1.0, 2: 1.1})), HERE)
    assert decided.of(UNET, OPENVINO)["joined"].value == "2"


def test_planted_rows_decide_where_a_bundle_runs(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `devices` tells and loading does; a damaged line among them is told, and what the user says comes first."""
    from runtime.bundle.manifest import Bundle
    from runtime.placing.devices import detect
    from runtime.placing.placement import PlacementOptions

    monkeypatch.setenv(DATA, str(tmp_path))
    one, machine = Bundle(tiny_bundle).manifest, detect()
    collected = overview.collect(tiny_bundle, None, "", PlacementOptions(), None)
    assert {found["place"] for found in collected["placement"]} == {"openvino:CPU"}
    assert not collected["profile"] and any("enginecast tune" in note for note in collected["notes"])

    own = {
        "bundle": one.name, "source": one.source.name, "quant": one.quant, "threads": machine.allowed.threads,
        "fingerprint": Fingerprint.of(machine),
    }  # fmt: skip
    rows = [
        row(target, value, metric=metric, **own)
        for target, values in {"openvino": (1.0, 10.0), "onnxruntime": (0.5, 20.0)}.items()
        for metric, value in zip(("first_token", "decode"), values, strict=True)
    ]
    file = tmp_path / "rows" / "planted.jsonl"
    append(file, rows)
    with file.open("a") as open_file:
        open_file.write("damaged\n")
    collected = overview.collect(tiny_bundle, None, "", PlacementOptions(), None)
    assert {found["place"] for found in collected["placement"]} == {"onnxruntime:CPUExecutionProvider"}
    reason = "before openvino: measured 3.7 against 7.4 s for an answer of 64 tokens about a picture on this processor"
    assert {(found["choice"], found["why"]) for found in collected["profile"]} == {
        ("target=onnxruntime", f"{reason}, 2026-11-20")
    }
    told = [note for note in collected["notes"] if str(file) in note]
    assert len(told) == 1 and "line 5 is no row" in told[0]

    model = load_model(tiny_bundle)
    assert model.target == "onnxruntime" and told[0] in model.notes
    assert all(f"target=onnxruntime: {reason}, 2026-11-20" in engine.chosen for engine in model.engines.values())
    model.close()
    with pytest.raises(EngineUnavailable):
        load_model(tiny_bundle, "coreml")
    asked = load_model(tiny_bundle, "openvino")
    assert asked.target == "openvino" and not any("target" in engine.decisions for engine in asked.engines.values())
    asked.close()


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    found = collect([tmp_path / "missing.jsonl", tmp_path / "folder.jsonl"])
    assert not found.rows and len(found.faults) == 2
    assert all("they decide nothing" in fault for fault in found.faults)
