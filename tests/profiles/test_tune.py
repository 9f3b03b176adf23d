"""`enginecast tune` measures what the runtime chooses by, stores it, and says what it decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from profiles import rowed, rows, tune, tuning
from profiles.process import Worker
from profiles.worker import Job
from runtime.bundle.manifest import Bundle
from runtime.errors import EngineUnavailable, NotFound
from runtime.files import DATA
from runtime.placing.containers import allowance
from runtime.placing.loading import LoadedModel, load_model

ALL = allowance().threads


class Planned(Worker):
    """A worker whose figures are made up of its job."""

    def __init__(self, job: Job, metrics: dict[str, float]) -> None:
        self.job, self.metrics = job, metrics

    def __enter__(self) -> Planned:
        self.hello = {
            "program": "enginecast 1", "target": self.job.target, "device": "CPU", "threads": self.job.threads or ALL,
            "versions": {}, "load": 0.0,
            "metrics": {name: {"unit": "s", "name": name.split()[0]} for name in self.metrics},
        }  # fmt: skip
        return self

    def __exit__(self, *error: Any) -> None: ...

    def measure(self, metric: str) -> float:
        return self.metrics[metric]


@pytest.mark.skipif(ALL < 2, reason="there are no fewer threads")
@pytest.mark.parametrize("half", [0.5, 2.0], ids=["half of the threads", "all threads"])
def test_what_is_measured(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, half: float) -> None:
    """The targets, then the threads of the fastest, then its calls with more rows, with the best threads."""
    jobs, said = list[Job](), list[str]()

    def planned(job: Job) -> Worker:
        jobs.append(job)
        seconds = {"openvino": 2.0, "onnxruntime": 1.0}[job.target]
        return Planned(job, {"unet": 0.1, "picture": seconds * (half if job.threads else 1.0)})

    def together(command: list[str]) -> Worker:
        jobs.append(job := Job.model_validate_json(command[-1]))
        assert command[1:3] == ["-m", "profiles.rowed"]
        return Planned(job, {"unet x1": 0.1, "unet x2": 0.11})

    monkeypatch.setattr(tuning, "bundle_worker", planned)
    monkeypatch.setattr(tuning, "Worker", together)
    monkeypatch.setattr(tuning, "fewer", lambda threads: (1,))
    found = list(tuning.Tuning(bundle, ("openvino", "onnxruntime"), {"steps": 3}, 2, said.append).rows())
    assert [(job.target, job.threads) for job in jobs] == [
        ("openvino", 0), ("onnxruntime", 0), ("onnxruntime", 0), ("onnxruntime", 1),
        ("onnxruntime", 1 if half < 1 else 0),
    ]  # fmt: skip
    assert all(job.settings == {"steps": 3} for job in jobs)
    assert [[(row.metric, row.target, row.threads) for row in part] for part in found] == [
        [("picture", "openvino", ALL), ("picture", "onnxruntime", ALL)],
        [("picture", "onnxruntime", ALL), ("picture", "onnxruntime", 1)],
        [("unet", "onnxruntime", jobs[-1].threads or ALL)] * 2,
    ]
    assert [len({row.run for row in part}) for part in found] == [1, 1, 1], "each part was measured in turns"
    assert all(row.spread.repetitions == 2 for part in found for row in part) and len(said) == 6


def test_numbers_of_threads() -> None:
    assert [tuning.fewer(threads) for threads in (1, 2, 4, 8, 64)] == [(), (1,), (2,), (4,), (32, 16)]


def test_calls_with_more_rows(drawing: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rowed.rowed_probes(drawing, {"steps": 2, "width": 128, "height": 128})
    shown = {probe.key: probe.settings for probe in found}
    assert [name for name in shown if name.startswith("unet")] == ["unet x1", "unet x2", "unet x4", "unet x8"]
    assert shown["unet x1"]["sample"] == "2x4x8x8" and shown["unet x4"]["sample"] == "8x4x8x8"
    assert all(probe.run() > 0 for probe in found)
    monkeypatch.setattr(rowed, "LONG", 0.0)
    assert not rowed.rowed_probes(drawing, {"steps": 2}), "calls that a server would not join"


def test_command(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured of a real bundle decides how it is loaded from then on."""
    monkeypatch.setenv(DATA, str(tmp_path))
    monkeypatch.setattr(tuning, "fewer", lambda threads: ())
    monkeypatch.setattr(tune, "others", lambda: 0.25)
    ended = CliRunner().invoke(tune.app, [str(tiny_bundle), "--repeat", "1"])
    assert ended.exit_code == 0, ended.output
    assert "other programs keep 25% of the processors busy" in ended.output
    (file,) = (tmp_path / "rows").iterdir()
    stored = rows.read(file)
    assert {row.target for row in stored if row.metric == "decode"} == {"openvino", "onnxruntime"}
    assert all(row.family == "llava" for row in stored) and str(file) in ended.output
    model = load_model(tiny_bundle)
    decided = next(iter(model.engines.values())).decisions["target"]
    assert model.target == decided.value and f"target={decided.value}: {decided.reason}" in ended.output
    model.close()


def test_mistakes(bundle: Bundle, tmp_path: Path) -> None:
    for arguments, error in (([str(tmp_path / "none")], NotFound), ([str(bundle.root)], EngineUnavailable)):
        with pytest.raises(error):
            CliRunner().invoke(tune.app, arguments, catch_exceptions=False)
