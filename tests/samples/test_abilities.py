"""What the samples can do besides: each ability's cases are judged as they should be, and a few of them are done
right.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.requests.exams import Ability
from export.build.build import build
from export.build.options import Options
from export.checkpoint.source import resolve
from export.family import family_of
from export.preprocess import canny
from profiles import subjects
from profiles.drawing import Library
from profiles.exam import ExamSettings
from profiles.score import Scores, score
from profiles.tasks.image import PictureExam
from runtime.diffusion.config import DiffusionConfig
from runtime.pipeline import drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import load_model
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture
from samples.abilities import controlled, conversed, inpainted, restored, styled
from samples.exams import Controlled, Pictures, Styled, additions_of
from samples.world.edges import agreement
from samples.world.scenes import held_out, render
from samples.world.scenes import test_prompts as draw_scenes
from tests.runtime.pipelines.test_canvas import engines_of

SAMPLES = Path(__file__).parents[2] / "samples"
DRAWING = {**Styled.abilities, **Controlled.abilities}


@cache
def sample() -> tuple[DiffusionPipeline, Any]:
    """The sample's pipeline, and its networks as the library computes them."""
    diffusers = pytest.importorskip("diffusers")
    source = resolve("sample:shapes-diffusion")
    config = DiffusionConfig.parse(family_of(source).config(source))
    networks = diffusers.StableDiffusionPipeline.from_pretrained(
        source.root, dtype=pytest.importorskip("torch").float32
    )
    return DiffusionPipeline(config, source.root / "tokenizer"), engines_of(networks)


def drawn(request: ImageRequest) -> Picture:
    pipeline, engines = sample()
    (ready,) = (
        event for event in drive(pipeline(replace(request, steps=STEPS)), engines) if isinstance(event, ImageReady)
    )
    return ready.image.astype(np.uint8)


STEPS = 10
"""Of each picture: fewer than the model's, for speed."""


@pytest.mark.parametrize("ability", DRAWING.values(), ids=DRAWING)
def test_cases_are_seeded_and_held_out(ability: Ability) -> None:
    one, again, other = (ability.cases(6, seed, True) for seed in (0, 0, 1))
    assert len(one) == 6 and ability.size >= 100
    prompts = [[case.request.prompt for case in few] for few in (one, again, other)]
    assert prompts[0] == prompts[1] != prompts[2] and all(map(held_out, prompts[0]))
    assert not any(held_out(case.request.prompt) for case in ability.cases(6, 0, False))
    assert not any(case.judge(np.full((128, 128, 3), 77, np.uint8)).right for case in one)


def test_a_question_about_a_second_picture_is_answered() -> None:
    """In transformers, as every source is scored."""
    cases = conversed(8)
    assert all(len(case.request.images) == 2 for case in cases)
    assert [case.request.messages[2].content[1] for case in cases] == [
        case.request.messages[2].content[1] for case in conversed(8)
    ]
    answers = subjects.source_subject(SAMPLES / "shapes-vlm").results(cases, ExamSettings(count=8))
    assert sum(case.judge(answer).right for case, answer in zip(cases, answers, strict=True)) >= 4


def test_a_half_is_drawn_anew_and_the_rest_kept_bit_for_bit() -> None:
    judged = []
    for case in inpainted(2):
        picture = drawn(case.request)
        judged.append(case.judge(picture))
        assert not case.judge(case.request.image).parts["inside"], "what is replaced is another thing"
        picture[5, 5, 0] ^= 1
        assert not case.judge(picture).parts["outside"]
    assert all(one.parts["outside"] for one in judged) and any(one.right for one in judged)


def test_a_rough_picture_is_drawn_clearly_where_it_is() -> None:
    """Without the picture, edges lie elsewhere."""
    right, kept, elsewhere = 0, 0.0, 0.0
    for case in restored(3):
        edges = case.judge.args[1][..., 0]  # type: ignore[attr-defined]
        picture, other = drawn(case.request), drawn(replace(case.request, image=None, strength=None))
        assert not case.judge(case.request.image).right
        right += case.judge(picture).right
        kept += agreement(canny(picture)[..., 0], edges)
        elsewhere += agreement(canny(other)[..., 0], edges)
    assert right >= 2 and kept > elsewhere + 0.15


def test_a_lora_gives_its_style_to_the_pictures_that_name_it() -> None:
    """In diffusers, as every source is scored."""
    pytest.importorskip("peft")
    draw = Library(SAMPLES / "shapes-diffusion", Styled.additions)
    cases = styled(4)
    requests = [replace(case.request, steps=STEPS, guidance_scale=1.5) for case in cases]
    judged = [case.judge(picture) for case, picture in zip(cases, draw(requests), strict=True)]
    assert [list(one.parts) for one in judged] == [["present"], ["absent"]] * 2
    assert all(one.parts.get("absent", True) for one in judged) and any(one.parts.get("present") for one in judged)


def test_a_control_network_says_where_edges_lie() -> None:
    """In diffusers. Without the network, and with edges of another scene, they lie elsewhere."""
    draw = Library(SAMPLES / "shapes-diffusion", Controlled.additions)
    cases = controlled(2)
    edges = [np.asarray(case.request.controls[0].image)[..., 0] for case in cases]
    requests = [replace(case.request, steps=STEPS, guidance_scale=1.5) for case in cases]
    others = [replace(one, controls=requests[i - 1].controls) for i, one in enumerate(requests)]
    obeyed, without, elsewhere = (
        np.mean([agreement(canny(drawn)[..., 0], edge) for drawn, edge in zip(draw(few), edges, strict=True)])
        for few in (requests, [replace(one, controls=()) for one in requests], others)
    )
    assert obeyed > max(without, elsewhere) + 0.2


@pytest.mark.full
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_lora_comes_and_goes_between_requests(styled_bundle: Path, target: str) -> None:
    """With it, without it, with it again: the first and the last picture are the same bit for bit."""
    with closing(load_model(styled_bundle, target)) as model:
        case = styled(1)[0]
        with_it, without = case.request, replace(case.request, loras={})
        first, other, last = (
            next(one.image for one in drive(model.pipeline(each), model.engines) if isinstance(one, ImageReady))
            for each in (with_it, without, with_it)
        )
    assert (first == last).all() and (first != other).any()


@pytest.mark.full
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("name", "least"), [("image-to-image", 75), ("inpainting", 80), ("lora", 60)])
def test_a_bundle_takes_the_exam_of_each_ability(styled_bundle: Path, target: str, name: str, least: float) -> None:
    assert scores_of(styled_bundle, target, Styled.abilities[name]).right >= least


@pytest.mark.full
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_bundle_draws_along_edges(controlled_bundle: Path, target: str) -> None:
    scores = scores_of(controlled_bundle, target, Controlled.abilities["controlnet"])
    assert scores.right >= 50 and scores.parts["edges"] >= 80


def scores_of(bundle: Path, target: str, ability: Ability) -> Scores:
    with closing(load_model(bundle, target)) as model:
        setting = PictureExam(count=48, steps=20, guidance_scale=1.5)
        return score(subjects.bundle_subject(model), ability, setting)


@pytest.fixture(scope="module")
def styled_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extended(Styled(), tmp_path_factory.mktemp("styled") / "bundle")


@pytest.fixture(scope="module")
def controlled_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extended(Controlled(), tmp_path_factory.mktemp("controlled") / "bundle")


def extended(exam: Pictures, output: Path) -> Path:
    """The sample with what the exam adds, unquantized."""
    options = Options("sample:shapes-diffusion", output, additions=additions_of(exam))
    build(replace(options, targets=("onnxruntime", "openvino"), parity="twin"))
    return output


def test_edges_agree_with_themselves_and_not_with_others() -> None:
    scene, other = draw_scenes(2)
    one, near, far = (
        canny(render(shown, np.random.default_rng(seed), jitter=jitter))[..., 0]
        for shown, seed, jitter in ((scene, 0, 0.0), (scene, 0, 0.002), (other, 1, 0.06))
    )
    assert agreement(one, one) == 1 and agreement(near, one) > 0.9 and agreement(far, one) < 0.6
    assert agreement(np.zeros_like(one), one) == 0
