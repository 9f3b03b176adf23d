"""The samples' exams: bound to their checkpoints, seeded, and nothing held out is calibrated with."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from calibration.requests.exams import exam_of, exams, find
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import Addition
from runtime.errors import NotFound
from samples.abilities import ATTRIBUTES
from samples.exams import OTHERS, Pictures, Questions, SampleExam, Styled
from samples.world.questions import KINDS
from samples.world.questions import test_questions as draw_questions
from samples.world.scenes import held_out, render
from samples.world.scenes import test_prompts as draw_scenes

SAMPLES = Path(__file__).parents[2] / "samples"
EXAMS = (Pictures(), Questions())


@pytest.mark.parametrize("exam", EXAMS, ids=lambda exam: exam.folder)
def test_an_exam_belongs_to_the_checkpoint_beside_it(exam: SampleExam, tmp_path: Path) -> None:
    assert type(exam) in {type(one) for one in exams()}, "declared as an entry point; install the project again"
    state = Build.open(Options(f"sample:{exam.folder}", tmp_path / "bundle"))
    found = exam_of(state.fingerprint)
    assert isinstance(found, type(exam))
    copy = shutil.copytree(SAMPLES / exam.folder, tmp_path / "another-name")
    assert exam.is_of(copy) and exam_of(Build.open(Options(str(copy), tmp_path / "bundle")).fingerprint) is found


def test_a_build_with_the_lora_has_an_exam_of_its_own(tmp_path: Path) -> None:
    ((name, path),) = Styled.additions["adapter"].items()
    options = Options("sample:shapes-diffusion", tmp_path / "bundle", additions=(Addition("adapter", path, name),))
    found = exam_of(Build.open(options).fingerprint)
    assert isinstance(found, Styled) and found.is_of(SAMPLES / "shapes-diffusion")
    requests = [request.loras for request in islice(found.calibration(0), 4)]
    assert requests == [{}, {}, {name: 1.0}, {name: 1.0}]


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


def test_cases_for_a_search_are_not_held_out() -> None:
    assert all(held_out(case.request.prompt) for case in Pictures().cases(20))
    assert not any(held_out(case.request.prompt) for case in Pictures().cases(20, seed=1, held=False))
