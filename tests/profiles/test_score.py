from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from profiles import cli, rows, score, subjects
from profiles.subjects import Exam, Subject
from profiles.together import drive_together
from runtime.errors import BundleError, EnginecastError, InvalidInput, NotFound, SourceError
from runtime.pipeline import Progress, drive
from runtime.placing.loading import LoadedModel
from runtime.tasks.image import ImageDefaults, ImageReady, ImageRequest
from samples.world.questions import KINDS, Case
from samples.world.scenes import Scene, render

Pictures = Callable[[Sequence[Scene], Exam], Iterable[Any]]


def exam_of(count: int) -> Exam:
    return Exam(count=count, steps=2, guidance_scale=3.0, batch=2)


def subject(**changes: Any) -> Subject:
    def nothing(cases: Sequence[Any], exam: Exam) -> list[Any]:
        raise AssertionError

    return replace(Subject("enginecast", "b", "none", "openvino", "CPU", "chat", nothing, nothing), **changes)


def drawn(scenes: Sequence[Scene], exam: Exam) -> list[Any]:
    """Every picture right but the first, whose background is of another colour, with a thing too few."""
    wrong = replace(
        scenes[0], background="white" if scenes[0].background != "white" else "black", things=scenes[0].things[1:]
    )
    return [render(scene, np.random.default_rng(0)) for scene in (wrong, *scenes[1:])]


def said(cases: Sequence[Case], exam: Exam) -> list[str]:
    """Every answer right but those about counts."""
    return ["many" if case.kind == "count" else case.answer.upper() for case in cases]


def test_pictures() -> None:
    ticks: list[None] = []
    scores = score.score(subject(kind="diffusion", pictures=drawn), exam_of(10), lambda: ticks.append(None))
    assert scores.right == 90 and scores.count == len(ticks) == 10
    assert scores.parts == {"background": 90, "missing": 90, "extra": 100, "size": 100, "colour": 100, "shape": 100}


def test_what_was_never_drawn_is_not_right() -> None:
    empty = subject(kind="diffusion", pictures=lambda scenes, exam: [np.full((64, 64, 3), 255, np.uint8)] * len(scenes))
    parts = score.score(empty, exam_of(10)).parts
    assert parts.keys() == {"background", "missing", "extra"} and parts["missing"] == 0 and parts["extra"] == 100
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    noisy = subject(kind="diffusion", pictures=lambda scenes, exam: [noise] * len(scenes))
    scores = score.score(noisy, exam_of(10))
    assert scores.parts == {"background": 0, "missing": 0}
    both = [(one, score.score(one, exam_of(10))) for one in (subject(kind="diffusion", pictures=drawn), noisy)]
    columns = {column.header: list(column.cells) for column in score.table(both).columns}
    assert columns["colour"] == ["100.0", "-"]


def test_answers() -> None:
    scores = score.score(subject(answers=said), exam_of(80))
    assert scores.right == 87.5
    assert scores.parts == {kind: 0.0 if kind == "count" else 100.0 for kind in KINDS}


def test_rows_and_table(tmp_path: Path) -> None:
    exam = exam_of(80)
    one, other = subject(answers=said), subject(quant="int8", answers=lambda cases, exam: ["?"] * len(cases))
    results = [(one, score.score(one, exam)), (other, score.score(other, exam))]
    found = score.rows(one, exam, results[0][1], threads=1)
    assert {row.metric for row in found} == {"right"} | {f"right.{kind}" for kind in KINDS}
    assert found[0].spread.median == 87.5 and found[0].unit == "%" and found[0].settings["count"] == 80
    rows.append(tmp_path / "rows.jsonl", found)
    assert rows.read(tmp_path / "rows.jsonl") == found
    columns = {column.header: list(column.cells) for column in score.table(results).columns}
    assert columns["right"] == ["87.5 %", "0.0 %"] and columns["drop"] == ["", "+87.5"]


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


def test_a_bundle_draws_each_case_from_its_own_seed(drawing: LoadedModel) -> None:
    exam = exam_of(5)
    pictures: list[Any] = []
    scores = score.score(_keeping(subjects.bundle_subject(drawing), pictures), exam)
    assert scores.count == len(pictures) == 5
    fourth = ImageRequest(score.test_prompts(5)[3].caption, steps=2, guidance_scale=3.0, seed=3)
    (ready,) = [event for event in drive(drawing.pipeline(fourth), drawing.engines) if isinstance(event, ImageReady)]
    assert np.array_equal(pictures[3], ready.image)


def _keeping(of: Subject, kept: list[Any]) -> Subject:
    def pictures(scenes: Sequence[Scene], exam: Exam) -> Iterable[Any]:
        for picture in of.pictures(scenes, exam):
            kept.append(picture)
            yield picture

    return replace(of, pictures=pictures)


def test_source_and_bundle_answer_alike(tiny_vlm: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    stored = tmp_path / "rows.jsonl"
    options = f"--target onnxruntime --source {tiny_vlm} --count 8 --store --rows {stored}"
    ended = CliRunner().invoke(cli.app, ["score", str(tiny_bundle), *options.split()])
    assert ended.exit_code == 0, ended.output
    assert [row.target for row in rows.read(stored) if row.metric == "right"] == ["torch", "onnxruntime"]
    exam, cases = exam_of(4), score.test_questions(4)
    (source, bundle) = (list(one.answers(cases, exam)) for one in _subjects(tiny_vlm, tiny_bundle))
    assert [answer.strip() for answer in source] == [answer.strip() for answer in bundle]


def _subjects(source: Path, bundle: Path) -> Iterable[Subject]:
    from runtime.engine import Options

    return subjects.subjects(source, [bundle], ["onnxruntime"], Options())


def test_the_source_draws_from_the_same_noise(tiny_diffusion: Path) -> None:
    exam = exam_of(3)
    scenes = score.test_prompts(3)
    source = subjects.source_subject(tiny_diffusion)
    pictures = list(source.pictures(scenes, exam))
    assert len(pictures) == 3 and pictures[0].dtype == np.uint8 and pictures[0].ndim == 3
    alone = list(source.pictures(scenes, exam.model_copy(update={"batch": 1})))
    assert all(np.abs(one.astype(int) - other).max() <= 1 for one, other in zip(pictures, alone, strict=True))


def test_models_are_drawn_as_they_ask_to_be(drawing: LoadedModel, tiny_diffusion: Path, tmp_path: Path) -> None:
    assert subjects.defaults(tiny_diffusion, []) == ImageDefaults()
    assert subjects.defaults(None, [drawing.bundle.root]).steps == 3
    (tmp_path / "enginecast.json").write_text('{"guidance_scale": 2.5}')
    assert subjects.defaults(tmp_path, [drawing.bundle.root]) == ImageDefaults(guidance_scale=2.5)


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
    with pytest.raises(BundleError, match="kinds chat, diffusion"):
        subjects.kind_of(tiny_vlm, [bundle.root])
