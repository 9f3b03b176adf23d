"""What the samples can do besides drawing from a prompt and answering about a picture, as cases that a program judges.

Each function gives cases: (count, seed, held) as of `Exam.cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from calibration.requests.exams import Case, Judged
from export.preprocess import canny
from runtime.language.text import Message
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture
from samples.world.edges import agreement
from samples.world.questions import Case as Question
from samples.world.questions import test_questions
from samples.world.scenes import COLOURS, Scene, render, test_prompts
from samples.world.scoring import read_picture, score_answer, score_picture
from samples.world.styles import negative

ATTRIBUTES: Final = ("background", "missing", "extra", "size", "colour", "shape")
"""In what a picture can be wrong, as `samples.world.scoring` names it."""
STRENGTH: Final = 0.7
"""Of image to image: what is left of the picture says where things are, and what colour they get is open."""
USUAL: Final = 0.02
"""How far from its place the model draws a thing, as a share of the edge."""
KEPT: Final = 0.8
"""The least agreement of edges that count as kept."""
NEGATIVE: Final = "negative"
"""The name of the LoRA."""


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


def recoloured(count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
    """Pictures of scenes, whose things get other colours and stay where they are."""
    return [_recoloured(scene, number) for number, scene in enumerate(test_prompts(count, seed, held))]


def _recoloured(scene: Scene, number: int) -> Case:
    rng = np.random.default_rng(number)
    others = [replace(one, colour=str(rng.choice([c for c in COLOURS if c != one.colour]))) for one in scene.things]
    picture = render(Scene(scene.background, tuple(others)), rng, jitter=USUAL)
    request = ImageRequest(scene.caption, seed=number, image=picture, strength=STRENGTH)
    return Case(request, partial(_judge_edges, scene, canny(picture)))


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
    """Scenes to draw as negatives, with the LoRA; every other one without it, as they are."""
    loras = {NEGATIVE: 1.0}
    scenes = enumerate(test_prompts(count, seed, held))
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
    """Right if all is as it should be; the style is present, or absent, if the colours are."""
    wanted = negative(scene) if present else scene
    found = read_picture(drawn)
    style = (found.background, _colours(found)) == (wanted.background, _colours(wanted))
    return Judged(bool(score_picture(drawn, wanted)), {"present" if present else "absent": style})


def _colours(scene: Scene) -> list[str]:
    return sorted(thing.colour for thing in scene.things)
