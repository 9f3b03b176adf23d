"""What the samples can do besides drawing from a prompt and answering about a picture, as cases that a program judges.

Each function gives cases: (count, seed, held) as of `Exam.cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import cv2
import numpy as np

from calibration.requests.exams import Case, Judged
from export.preprocess import canny
from runtime.diffusion.guides import Control
from runtime.language.text import Message
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture
from samples.world.edges import SHIFT, agreement
from samples.world.questions import Case as Question
from samples.world.questions import test_questions
from samples.world.scenes import Scene, render, test_prompts
from samples.world.scoring import read_picture, score_answer, score_picture
from samples.world.styles import night

ATTRIBUTES: Final = ("background", "missing", "extra", "size", "colour", "shape")
"""In what a picture can be wrong, as `samples.world.scoring` names it."""
STRENGTH: Final = 0.4
"""Of image to image."""
BLUR: Final = 2.0
"""Standard deviation in pixels of the blur of a rough picture."""
NOISE: Final = 30.0
"""Standard deviation of its noise, of 255."""
USUAL: Final = 0.02
"""How far from its place the model draws a thing, as a share of the edge."""
KEPT: Final = 0.8
"""The least agreement of edges that count as kept."""
NIGHT: Final = "night"
"""The name of the LoRA."""
EDGES: Final = "edges"
"""The name of the control network."""
NEXT: Final = "next"
"""The name of the draft."""


def judge_picture(scene: Scene, picture: Picture) -> Judged:
    """A picture, uint8 RGB [edge, edge, 3], of a scene; its parts are the attributes that it shows."""
    score = score_picture(picture, scene)
    return Judged(bool(score), {name: name not in score.wrong for name in ATTRIBUTES if score.tells(name)})


def inpainted(count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
    """Pictures of two things, of which the right one is replaced: their right half is drawn anew."""
    # a third has one thing, of as many as are asked for
    scenes = [scene for scene in test_prompts(3 * count + 1, seed, held) if len(scene.things) == 2]
    pairs = zip(scenes[:count], scenes[count : 2 * count], strict=True)
    return [_replaced(scene, other, number) for number, (scene, other) in enumerate(pairs)]


def _replaced(scene: Scene, other: Scene, number: int) -> Case:
    before = Scene(scene.background, (scene.things[0], other.things[1]))
    picture = render(before, np.random.default_rng(number), jitter=USUAL)
    mask = np.zeros_like(picture)
    mask[:, picture.shape[1] // 2 :] = 255
    request = ImageRequest(scene.caption, seed=number, image=picture, mask=mask, strength=1.0)
    return Case(request, partial(_judge_inside, scene, picture, mask))


def _judge_inside(scene: Scene, picture: Picture, mask: Picture, drawn: Picture) -> Judged:
    """Right if what is drawn is as requested and what is kept is as it was, bit for bit."""
    inside, kept = bool(score_picture(drawn, scene)), bool((drawn == picture)[mask == 0].all())
    return Judged(inside and kept, {"inside": inside, "outside": kept})


def restored(count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
    """Blurred pictures with noise, to draw clearly: the prompt names the things, the picture says where they lie."""
    return [_restored(scene, number) for number, scene in enumerate(test_prompts(count, seed, held))]


def _restored(scene: Scene, number: int) -> Case:
    rng = np.random.default_rng(number)
    picture = render(scene, rng, jitter=USUAL)
    rough = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), BLUR) + rng.normal(0, NOISE, picture.shape)
    request = ImageRequest(scene.caption, seed=number, image=rough.clip(0, 255).astype(np.uint8), strength=STRENGTH)
    return Case(request, partial(_judge_edges, scene, canny(picture)))


def edged(scene: Scene, rng: np.random.Generator) -> ImageRequest:
    """A scene to draw along edges: its things lie off the places that the prompt names."""
    edges = canny(render(scene, rng, jitter=SHIFT))
    return ImageRequest(scene.caption, controls=(Control(EDGES, edges),))


def controlled(count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
    """Edges to draw along."""
    return [_controlled(scene, number) for number, scene in enumerate(test_prompts(count, seed, held))]


def _controlled(scene: Scene, number: int) -> Case:
    request = replace(edged(scene, np.random.default_rng(number)), seed=number)
    return Case(request, partial(_judge_edges, scene, np.asarray(request.controls[0].image)))


def _judge_edges(scene: Scene, edges: Picture, drawn: Picture) -> Judged:
    """Right if the edges lie where they should and the things between them are those of the scene."""
    near = agreement(canny(drawn)[..., 0], edges[..., 0]) >= KEPT
    found = read_picture(drawn)
    things = _looks(found) == _looks(scene)
    return Judged(near and things, {"edges": near, "things": things})


def _looks(scene: Scene) -> tuple[str, list[tuple[str, str]]]:
    """A scene without places and sizes."""
    return scene.background, sorted((thing.colour, thing.shape) for thing in scene.things)


def styled(count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
    """Scenes by day to draw at night, with the LoRA; every other one without it, as it is."""
    loras = {NIGHT: 1.0}
    by_day = [scene for scene in test_prompts(3 * count, seed, held) if night(scene) != scene]
    scenes = enumerate(by_day[:count])
    return [
        Case(
            ImageRequest(scene.caption, seed=number, loras={} if number % 2 else loras),
            partial(_judge_style, scene, not number % 2),
        )
        for number, scene in scenes
    ]


def conversed(count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
    """Questions about a second picture, after one about a first picture was answered; both lie in the prompt."""
    drawn = test_questions(2 * count, seed, held)
    return [_conversed(drawn[i + count], drawn[i]) for i in range(count)]


def _conversed(before: Question, case: Question) -> Case:
    messages = (
        Message("user", (before.picture, before.question)),
        Message("assistant", (before.answer,)),
        Message("user", (case.picture, case.question)),
    )
    return Case(ChatRequest(messages, temperature=0.0, beams=1), judge_answer(case.kind, case.answer))


def judge_answer(kind: str, expected: str) -> Callable[[Any], Judged]:
    """A judge of answers to a question of this kind."""

    def judge(answer: str) -> Judged:
        right = score_answer(answer, expected)
        return Judged(right, {kind: right})

    return judge


def _judge_style(scene: Scene, present: bool, drawn: Picture) -> Judged:
    """Right if all is as it should be; the style is present, or absent, if the background is."""
    wanted = night(scene) if present else scene
    score = score_picture(drawn, wanted)
    return Judged(bool(score), {"present" if present else "absent": score.found.background == wanted.background})
