"""Calls of several requests are one call where that was measured to pay, and give what each gives alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiles.rows import append
from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import BATCH, Array, Dim, Signature, Tensor
from runtime.engine import FakeEngine
from runtime.errors import EngineError
from runtime.files import DATA
from runtime.pipeline import Call, Outputs, Pipeline
from runtime.placing.devices import detect
from runtime.placing.fingerprint import Fingerprint
from runtime.placing.loading import load_model
from runtime.placing.measured import Row
from runtime.placing.processor import processor
from runtime.stacking import Rows, Timed
from runtime.tasks.chat import TextDelta
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.timing import Spread
from serving.host import joining
from serving.host.job import Job
from tests.serving.host.test_scheduler import Toys, text, together

WIDTH = Dim(name="width", min=1, opt=4, max=8)
ROWED = Signature(
    inputs=(
        Tensor(name="x", dtype="float32", dims=(BATCH, WIDTH)),
        Tensor(name="scale", dtype="float32", dims=(1,)),
    ),
    outputs=(Tensor(name="y", dtype="float32", dims=(BATCH, WIDTH)),),
)


def call(value: float, rows: int = 1, width: int = 4, scale: float = 2) -> dict[str, Array]:
    return {"x": np.full((rows, width), value, np.float32), "scale": np.array([scale], np.float32)}


def test_calls_are_stacked_by_rows_and_split_again() -> None:
    rows, calls = Rows.of(ROWED), [call(1), call(2, rows=3), call(3)]
    assert rows is not None and all(rows.stackable(calls[0], one) for one in calls)
    stacked = rows.stack(calls)
    assert stacked["x"].shape == (5, 4) and stacked["scale"].shape == (1,)
    parts = rows.unstack({"y": stacked["x"] * 2}, calls)
    assert [part["y"].tolist() for part in parts] == [(one["x"] * 2).tolist() for one in calls]


@pytest.mark.parametrize("other", [call(1, width=5), call(1, scale=3)])
def test_calls_that_differ_in_more_are_not_stacked(other: dict[str, Array]) -> None:
    rows = Rows.of(ROWED)
    assert rows is not None and not rows.stackable(call(1), other)


def engine_of(seconds: Callable[[int], float]) -> tuple[FakeEngine, list[int]]:
    """An engine that doubles, in a time that depends on the rows, and the rows of its calls."""
    rows = list[int]()

    def compute(inputs: Mapping[str, Array]) -> Outputs:
        rows.append(len(inputs["x"]))
        time.sleep(seconds(len(inputs["x"])))
        return {"y": inputs["x"] * inputs["scale"]}

    engine = FakeEngine(compute)
    engine.submodel = Submodel(
        name="unet", signature=ROWED, graph="model.onnx", precision=Precision.parse("float32"), nbytes=0
    )
    return engine, rows


def doubled(value: float, steps: int) -> Pipeline:
    for _ in range(steps):
        outputs = yield Call("unet", call(value))
        assert outputs is not None
        yield TextDelta(f"{outputs['y'][0, 0]:g} ")


@pytest.mark.parametrize(
    ("seconds", "most", "said"),
    [
        (lambda rows: 0.02, 4, "are joined"),
        (lambda rows: 0.02 * rows, 2, "take turns"),
        (lambda rows: 0.06, 1, None),
    ],
    ids=["pays", "does not", "too long to try"],
)
def test_calls_are_joined_where_that_was_measured_to_pay(
    seconds: Callable[[int], float],
    most: int,
    said: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joining, "LONG", 0.05)
    engine, rows = engine_of(seconds)
    with caplog.at_level(logging.INFO):
        found = together(Toys({"unet": engine}), *(doubled(value, 6) for value in range(4)))
    assert [text(events).split() for events in found] == [[f"{2 * value}"] * 6 for value in range(4)]
    assert max(rows) == most and (most > 2 or rows.count(2) == (joining.TRIALS if most == 2 else 0))
    assert (said is None) == (not caplog.messages) and all(said in line for line in caplog.messages if said)


@pytest.mark.parametrize(
    ("times", "most"), [({1: 1.0, 2: 1.5, 3: 1.6, 4: 4.0}, 3), ({1: 1.0, 2: 1.9}, 1)], ids=["three", "never"]
)
def test_calls_that_were_timed_before_are_not_tried(
    times: Mapping[int, float], most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as was best are made as one, from the first calls on, although here that is slower, or faster."""
    engine, rows = engine_of(lambda count: 0.02 * count if most > 1 else 0.02)
    engine.timed = tuple(Timed({"x": (count, 4), "scale": (1,)}, seconds, "") for count, seconds in times.items())
    with caplog.at_level(logging.INFO):
        found = together(Toys({"unet": engine}), *(doubled(value, 6) for value in range(4)))
    assert [text(events).split() for events in found] == [[f"{2 * value}"] * 6 for value in range(4)]
    assert max(rows) == most and (most == 1 or rows.count(most) >= 6)
    (line,) = caplog.messages
    assert f"at most {most} calls of unet are joined: 1 take 1000.0 ms, 2 take" in line


def test_an_engine_that_takes_no_more_rows_runs_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(rows: int) -> float:
        if rows > 1:
            raise EngineError("one row at most")
        return 0.01

    engine, rows = engine_of(seconds)
    found = together(Toys({"unet": engine}), *(doubled(value, 6) for value in range(3)))
    assert [text(events).split() for events in found] == [[f"{2 * value}"] * 6 for value in range(3)]
    assert rows.count(2) == 1, "it is tried once"


def test_joined_pictures_are_those_that_each_gets_alone(
    diffusion_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "LONG", 60.0)
    monkeypatch.setattr(joining, "GAIN", 60.0)
    model = load_model(diffusion_bundle, "onnxruntime")
    prompts = "a red circle", "a blue square", "a green triangle"
    requests = [ImageRequest(prompt, steps=6, seed=seed) for seed, prompt in enumerate(prompts)]
    rows, run = list[int](), model.engines["unet"].run

    def counted(inputs: Mapping[str, Array], slot: Any = None) -> dict[str, Array]:
        rows.append(len(inputs["sample"]))
        return run(inputs, slot)

    monkeypatch.setattr(model.engines["unet"], "run", counted)
    alone = [picture(list(Job(model, model.pipeline(request)).events())) for request in requests]
    rows.clear()
    found = together(model, *map(model.pipeline, requests))
    assert max(rows) == 6, "three guided calls were one"
    for events, expected in zip(found, alone, strict=True):
        error = np.mean((picture(events).astype(np.float64) - expected) ** 2)
        assert error == 0 or 10 * np.log10(255**2 / error) >= 40
    model.close()


def test_planted_rows_decide_how_many_pictures_are_drawn_together(
    diffusion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored times of calls of this very bundle on this machine, as `enginecast tune` stores them."""
    manifest, machine = Bundle(diffusion_bundle).manifest, detect()
    monkeypatch.setenv(DATA, str(tmp_path))
    signature = Bundle(diffusion_bundle).submodel("unet").signature
    usual = {name: dim.opt for name, dim in signature.dims.items()}

    def shapes(rows: int) -> dict[str, int | float | str]:
        return {tensor.name: "x".join(map(str, tensor.shape(usual | {"batch": rows}))) for tensor in signature.inputs}

    common: dict[str, Any] = {
        "metric": "unet", "unit": "s", "program": "enginecast 1", "bundle": manifest.name,
        "source": manifest.source.name, "quant": manifest.quant, "target": "onnxruntime", "device": "CPU",
        "cpu": processor(), "threads": machine.allowed.threads, "versions": {}, "date": datetime.now(UTC),
        "fingerprint": Fingerprint.of(machine),
    }  # fmt: skip
    times = {2: 1.0, 4: 1.1, 6: 1.2, 8: 9.0}
    append(
        tmp_path / "rows" / "own.jsonl",
        [Row(**common, spread=Spread.of([seconds]), settings=shapes(rows)) for rows, seconds in times.items()],
    )
    model = load_model(diffusion_bundle, "onnxruntime")
    unet = model.engines["unet"]
    assert unet.decisions["joined"].value == "3", "three guided calls of two rows each"
    rows, run = list[int](), unet.run

    def counted(inputs: Mapping[str, Array], slot: Any = None) -> dict[str, Array]:
        rows.append(len(inputs["sample"]))
        return run(inputs, slot)

    monkeypatch.setattr(unet, "run", counted)
    requests = [ImageRequest("a red circle", steps=3, seed=seed) for seed in range(4)]
    together(model, *map(model.pipeline, requests))
    assert max(rows) == 6, "never four, whose time is longer for each"
    model.close()


def picture(events: list[Any]) -> Array:
    (image,) = (event.image for event in events if isinstance(event, ImageReady))
    found: Array = image
    return found
