from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from calibration.requests import exams
from calibration.requests.exams import Case, Exam, Judged
from calibration.requests.tasks.chat import question
from profiles import cli, rows, score, subjects
from profiles.exam import Subject
from profiles.tasks.chat import AnswerExam
from profiles.tasks.image import PictureExam, defaults_of
from profiles.together import drive_together
from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import BATCH, Signature, Tensor
from runtime.diffusion.adapters import DOWN
from runtime.diffusion.defaults import ImageDefaults
from runtime.engine import FakeEngine
from runtime.errors import BundleError, EnginecastError, InvalidInput, NotFound, SourceError
from runtime.pipeline import Call, Pipeline, Progress, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageReady, ImageRequest
from samples.exams import Pictures


def setting_of(count: int) -> PictureExam:
    return PictureExam(count=count, steps=2, guidance_scale=3.0, batch=2)


def subject(**changes: Any) -> Subject:
    def nothing(cases: Sequence[Case], setting: PictureExam) -> list[Any]:
        raise AssertionError

    return replace(Subject("enginecast", "b", "none", "openvino", "CPU", nothing), **changes)


class Numbers(Exam):
    """Cases that are right when their number is said; odd ones have a part more."""

    title, size, fingerprint = "numbers said", 10, "numbers"

    def is_of(self, folder: Path) -> bool:
        return folder.name == "tiny-vlm"

    def calibration(self, seed: int) -> Iterator[Any]:
        raise AssertionError

    def comparison(self, count: int, seed: int) -> Iterator[Any]:
        raise AssertionError

    def cases(self, count: int, seed: int = 0, held: bool = True) -> list[Case]:
        def judge(number: int, said: str) -> Judged:
            right = said == str(number)
            return Judged(right, {"all": right} | ({"odd": right} if number % 2 else {}))

        picture = np.zeros((32, 32, 3), np.uint8)
        return [Case(question(picture, f"what is {i}?"), partial(judge, i)) for i in range(count)]


def said(cases: Sequence[Case], setting: PictureExam) -> list[str]:
    """Every number but 3."""
    return ["?" if i == 3 else str(i) for i in range(len(cases))]


def test_scores() -> None:
    ticks: list[None] = []
    scores = score.score(subject(results=said), Numbers(), setting_of(10), lambda: ticks.append(None))
    assert scores.right == 90 and scores.count == len(ticks) == 10
    assert scores.parts == {"all": 90, "odd": 80}


def test_a_part_that_no_case_has_is_left_out() -> None:
    one = subject(results=said)
    few, many = ((one, score.score(one, Numbers(), setting_of(count))) for count in (1, 2))
    columns = {column.header: list(column.cells) for column in score.table([many, few]).columns}
    assert columns["odd"] == ["100.0", "-"]


def test_rows_and_table(tmp_path: Path) -> None:
    setting = setting_of(80)
    one, other = subject(results=said), subject(quant="int8", results=lambda cases, setting: ["?"] * len(cases))
    results = [(subject, score.score(subject, Numbers(), setting)) for subject in (one, other)]
    found = score.rows(one, setting, results[0][1], threads=1)
    assert {row.metric for row in found} == {"right", "right.all", "right.odd"}
    assert found[0].spread.median == 98.75 and found[0].unit == "%" and found[0].settings["count"] == 80
    rows.append(tmp_path / "rows.jsonl", found)
    assert rows.read(tmp_path / "rows.jsonl") == found
    columns = {column.header: list(column.cells) for column in score.table(results).columns}
    assert columns["right"] == ["98.8 %", "0.0 %"] and columns["drop"] == ["", "+98.8"]


def test_pictures_drawn_together_are_those_drawn_alone(drawing: LoadedModel) -> None:
    requests = [
        ImageRequest(prompt, seed=seed, steps=3) for seed, prompt in enumerate(["a red circle", "a blue square", ""])
    ]
    requests.append(ImageRequest("a red circle", seed=9, steps=2, width=64))
    together = drive_together([drawing.pipeline(request) for request in requests], drawing.engines)
    engines: Any = drawing.engines
    assert [len(call["sample"]) for call in engines["unet"].calls] == [
        6,
        2,
        6,
        2,
        6,
    ]  # guidance doubles; another size goes alone
    for request, events in zip(requests, together, strict=True):
        alone = list(drive(drawing.pipeline(request), drawing.engines))
        assert (
            [type(event) for event in events]
            == [type(event) for event in alone]
            == [Progress] * (request.steps or 0) + [ImageReady]
        )
        assert isinstance(events[-1], ImageReady) and isinstance(alone[-1], ImageReady)
        assert np.array_equal(events[-1].image, alone[-1].image) and events[-1].seed == request.seed


def test_matrices_of_loras_are_shared_by_the_rows_of_a_call() -> None:
    """Calls with other matrices run apart."""
    engines = {"unet": FakeEngine(lambda inputs: {"y": inputs["x"] * inputs[DOWN][0, 0]})}
    x, y = (Tensor(name=name, dtype="float32", dims=(BATCH, 3)) for name in "xy")
    down = Tensor(name=DOWN, dtype="float32", dims=(4, 5))
    engines["unet"].submodel = Submodel(
        name="unet",
        signature=Signature(inputs=(x, down), outputs=(y,)),
        graph="model.onnx",
        precision=Precision.parse("float32"),
        nbytes=0,
    )

    def one(value: float) -> Pipeline:
        outputs = yield Call("unet", {"x": np.ones((2, 3), np.float32), DOWN: np.full((4, 5), value, np.float32)})
        yield Progress(int(outputs["y"][0, 0]), 9)

    events = drive_together([one(value) for value in (2, 3, 2)], engines)
    assert [event.step for few in events for event in few if isinstance(event, Progress)] == [2, 3, 2]
    assert [(len(call["x"]), len(call[DOWN])) for call in engines["unet"].calls] == [(4, 4), (2, 4)]


def test_a_bundle_draws_each_case_from_its_own_seed(drawing: LoadedModel) -> None:
    cases = [
        Case(ImageRequest(prompt, seed=seed), lambda picture: Judged(True, {})) for seed, prompt in enumerate("abcde")
    ]
    pictures = list(subjects.bundle_subject(drawing).results(cases, setting_of(5)))
    fourth = ImageRequest("d", steps=2, guidance_scale=3.0, seed=3)
    (ready,) = [event for event in drive(drawing.pipeline(fourth), drawing.engines) if isinstance(event, ImageReady)]
    assert len(pictures) == 5 and np.array_equal(pictures[3], ready.image)


@pytest.fixture
def numbers(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Numbers:
    """The only exam that there is, of the bundle's checkpoint."""
    exam = Numbers()
    exam.fingerprint = Bundle(tiny_bundle).manifest.source.fingerprint
    monkeypatch.setattr(exams, "exams", lambda: (exam,))
    return exam


def test_source_and_bundle_answer_alike(tiny_vlm: Path, tiny_bundle: Path, tmp_path: Path, numbers: Numbers) -> None:
    stored = tmp_path / "rows.jsonl"
    options = f"--target onnxruntime --source {tiny_vlm} --count 8 --store --rows {stored}"
    ended = CliRunner().invoke(cli.app, ["score", str(tiny_bundle), *options.split()])
    assert ended.exit_code == 0, ended.output
    assert [row.target for row in rows.read(stored) if row.metric == "right"] == ["torch", "onnxruntime"]
    setting = AnswerExam(count=4)
    (source, bundle) = (list(one.results(numbers.cases(4), setting)) for one in _subjects(tiny_vlm, tiny_bundle))
    assert [answer.strip() for answer in source] == [answer.strip() for answer in bundle]


@pytest.mark.usefixtures("numbers")
def test_pictures_are_scored_with_fewer_positions(
    tiny_vlm: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows say how many; the library reads all."""
    stored, given = tmp_path / "rows.jsonl", ["score", str(tiny_bundle), "--picture-tokens", "2", "--count", "2"]
    asked = list[int]()

    def prompt(self: ChatPipeline, request: ChatRequest) -> Any:
        asked.append(request.picture_tokens)
        return prompted(self, request)

    prompted = ChatPipeline.prompt
    monkeypatch.setattr(ChatPipeline, "prompt", prompt)
    ended = CliRunner().invoke(cli.app, [*given, "--target", "onnxruntime", "--store", "--rows", str(stored)])
    assert ended.exit_code == 0, ended.output
    assert {row.settings["picture_tokens"] for row in rows.read(stored)} == {2} == {*asked}
    with pytest.raises(InvalidInput, match="picture-tokens: is of bundles"):
        CliRunner().invoke(cli.app, [*given, "--source", str(tiny_vlm)], catch_exceptions=False)


def test_a_checkpoint_without_an_exam_is_not_scored(tiny_bundle: Path) -> None:
    with pytest.raises(NotFound, match="no exam in common"):
        CliRunner().invoke(cli.app, ["score", str(tiny_bundle)], catch_exceptions=False)


def _subjects(source: Path, bundle: Path) -> Iterable[Subject]:
    from runtime.engine import Options

    return subjects.subjects(source, [bundle], ["onnxruntime"], Options())


def test_the_source_draws_from_the_same_noise(tiny_diffusion: Path) -> None:
    cases = Pictures().cases(3)
    source = subjects.source_subject(tiny_diffusion)
    pictures = list(source.results(cases, setting_of(3)))
    assert len(pictures) == 3 and pictures[0].dtype == np.uint8 and pictures[0].ndim == 3
    alone = list(source.results(cases, setting_of(3).model_copy(update={"batch": 1})))
    assert all(np.abs(one.astype(int) - other).max() <= 1 for one, other in zip(pictures, alone, strict=True))


def test_models_are_drawn_as_they_ask_to_be(drawing: LoadedModel, tiny_diffusion: Path, tmp_path: Path) -> None:
    assert defaults_of(tiny_diffusion, []) == ImageDefaults()
    assert defaults_of(None, [drawing.bundle.root]).steps == 3
    (tmp_path / "enginecast.json").write_text('{"guidance_scale": 2.5}')
    assert defaults_of(tmp_path, [drawing.bundle.root]) == ImageDefaults(guidance_scale=2.5)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [("none", NotFound, "does not exist"), ("empty", SourceError, "no checkpoint to score")],
)
def test_no_source(tmp_path: Path, source: str, error: type[EnginecastError], message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        subjects.source_subject(tmp_path / source)


def test_mistakes(tmp_path: Path, bundle: Any, tiny_vlm: Path) -> None:
    with pytest.raises(InvalidInput, match="BUNDLE: is missing"):
        CliRunner().invoke(cli.app, ["score"], catch_exceptions=False)
    with pytest.raises(BundleError, match="tasks chat, image"):
        subjects.task_of(tiny_vlm, [bundle.root])
