"""The samples' exams: bound to their checkpoints, seeded, and nothing held out is calibrated with."""

from __future__ import annotations

import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from calibration.requests.exams import exam_of, exams, find
from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from profiles import subjects
from profiles.exam import ExamSettings
from profiles.score import score
from profiles.tasks.chat import AnswerExam
from runtime.errors import NotFound
from runtime.placing.loading import load_model
from samples.abilities import ATTRIBUTES
from samples.exams import (
    OTHERS,
    Captions,
    Controlled,
    Drafted,
    Pictures,
    Questions,
    SampleExam,
    Styled,
    additions_of,
)
from samples.world.questions import KINDS, SCENE_KINDS
from samples.world.questions import test_questions as draw_questions
from samples.world.scenes import held_out, render
from samples.world.scenes import test_prompts as draw_scenes

SAMPLES = Path(__file__).parents[2] / "samples"
EXAMS = (Pictures(), Questions(), Captions())


@pytest.mark.parametrize("exam", EXAMS, ids=lambda exam: exam.folder)
def test_an_exam_belongs_to_the_checkpoint_beside_it(exam: SampleExam, tmp_path: Path) -> None:
    assert type(exam) in {type(one) for one in exams()}, "declared as an entry point; install the project again"
    state = Build.open(Options(f"sample:{exam.folder}", tmp_path / "bundle"))
    found = exam_of(state.fingerprint)
    assert isinstance(found, type(exam))
    copy = shutil.copytree(SAMPLES / exam.folder, tmp_path / "another-name")
    assert exam.is_of(copy) and exam_of(Build.open(Options(str(copy), tmp_path / "bundle")).fingerprint) is found


@pytest.mark.parametrize("exam", [Styled(), Controlled()], ids=lambda exam: next(iter(exam.additions)))
def test_a_build_with_additions_has_an_exam_of_its_own(exam: SampleExam, tmp_path: Path) -> None:
    options = Options("sample:shapes-diffusion", tmp_path / "bundle", additions=additions_of(exam))
    found = exam_of(Build.open(options).fingerprint)
    assert isinstance(found, type(exam)) and found.is_of(SAMPLES / "shapes-diffusion")
    requests = list(islice(found.calibration(0), 8))
    assert [bool(one.loras or one.controls) for one in requests] == [False, False, True, True] * 2
    assert not any(held_out(one.prompt) for one in requests if one.prompt not in OTHERS)


def test_a_build_with_a_draft_has_the_same_exam(tmp_path: Path) -> None:
    options = Options("sample:shapes-vlm", tmp_path / "bundle", additions=additions_of(Drafted()))
    found = exam_of(Build.open(options).fingerprint)
    assert isinstance(found, Drafted) and found.is_of(SAMPLES / "shapes-vlm")
    assert [case.request.messages for case in found.cases(0)] == [] and found.abilities == Questions.abilities


def test_an_exam_is_found_by_its_ability(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SAMPLES / "shapes-diffusion"
    plain, with_lora = (find([], source, ability) for ability in ("inpainting", "lora"))
    assert (type(plain), type(with_lora)) == (Pictures, Styled) and type(find([], source)) is Pictures
    assert type(find([with_lora.fingerprint], source)) is Styled
    with pytest.raises(NotFound, match="no exam of 'painting': did you mean 'inpainting'"):
        find([], source, "painting")
    with pytest.raises(NotFound, match=r"no exam of 'lora': .known: several-pictures"):
        find([], SAMPLES / "shapes-vlm", "lora")
    monkeypatch.setattr(Questions, "abilities", {})
    with pytest.raises(NotFound, match="scored in questions answered right alone"):
        find([], SAMPLES / "shapes-vlm", "lora")
    with pytest.raises(NotFound, match="no exam in common"):
        find([plain.fingerprint, with_lora.fingerprint], None)


def test_a_folder_of_the_same_name_is_not_enough(tiny_vlm: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_vlm, tmp_path / "shapes-vlm")
    assert not Questions().is_of(copy) and not Pictures().is_of(copy)
    assert exam_of(Build.open(Options(str(copy), tmp_path / "bundle")).fingerprint) is None


def test_pictures_are_calibrated_with_captions_that_are_not_held_out() -> None:
    one, again, other = ([r.prompt for r in islice(Pictures().calibration(seed), 40)] for seed in (0, 0, 1))
    assert one == again != other and set(one[1::2]) == set(OTHERS)
    assert not any(held_out(prompt) for prompt in one[::2])


def test_questions_show_a_picture() -> None:
    one, again = (list(islice(Questions().calibration(0), 6)) for _ in range(2))
    assert all(request.images[0].shape == (128, 128, 3) for request in one)
    assert [request.messages[0].content[1] for request in one] == [request.messages[0].content[1] for request in again]


def test_pictures_are_judged_by_attribute() -> None:
    (case, scene) = Pictures().cases(10)[3], draw_scenes(10)[3]
    assert (case.request.prompt, case.request.seed) == (scene.caption, 3)
    right = case.judge(render(scene, np.random.default_rng(0)))
    assert right.right and right.parts == dict.fromkeys(ATTRIBUTES, True)
    empty = case.judge(np.full((64, 64, 3), 255, np.uint8))
    assert not empty.right and empty.parts.keys() == {"background", "missing", "extra"} and not empty.parts["missing"]
    noise = case.judge(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert noise.parts == {"background": False, "missing": False}


def test_answers_are_judged_by_kind() -> None:
    for case, drawn in zip(Questions().cases(16), draw_questions(16), strict=True):
        assert case.judge(drawn.answer.upper()).parts == {drawn.kind: True} and not case.judge("?").right
    assert {kind for case in Questions().cases(16) for kind in case.judge("").parts} == set(KINDS)


def test_captions_are_of_a_picture_alone_and_questions_worded_for_the_model() -> None:
    texts = [case.request.messages[0].content[1] for case in Captions().cases(14)]
    assert texts.count("") == 2 and all(text.startswith("Question: ") for text in texts if text)
    assert {kind for case in Captions().cases(14) for kind in case.judge("").parts} == set(SCENE_KINDS)
    assert "" in [request.messages[0].content[1] for request in islice(Captions().calibration(0), 60)]


def test_captions_and_answers_are_right_in_transformers() -> None:
    cases = Captions().cases(14)
    answers = subjects.source_subject(SAMPLES / "shapes-blip2").results(cases, ExamSettings(count=14))
    judged = [case.judge(answer) for case, answer in zip(cases, answers, strict=True)]
    assert sum(one.right for one in judged) >= 12 and any(one.parts.get("caption") for one in judged)


@pytest.mark.full
def test_captions_and_answers_are_right_in_bundles(tmp_path: Path) -> None:
    targets = ("onnxruntime", "openvino")
    bundle, _ = build(Options("sample:shapes-blip2", tmp_path / "bundle", targets=targets, parity="twin"))
    for target in targets:
        with closing(load_model(bundle.root, target)) as model:
            scores = score(subjects.bundle_subject(model), Captions(), AnswerExam(count=140))
        assert scores.right >= 95 and scores.parts["caption"] >= 80


def test_cases_for_a_search_are_not_held_out() -> None:
    assert all(held_out(case.request.prompt) for case in Pictures().cases(20))
    assert not any(held_out(case.request.prompt) for case in Pictures().cases(20, seed=1, held=False))
