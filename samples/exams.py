"""The exams of the two sample checkpoints: held-out scenes and questions of the coloured-shapes world.

Declared as entry points `enginecast.exams`. Each exam belongs to the checkpoint that lies beside this file, whichever
name a copy of it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from calibration.requests.exams import Case, Exam, Judged
from calibration.requests.tasks.chat import question
from export.checkpoint.source import open_component
from runtime.errors import NotFound, SourceError
from runtime.files import key_of
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture
from samples.world.questions import draw_scene, scene_questions, test_questions
from samples.world.scenes import Scene, held_out, picture_scenes, render, test_prompts
from samples.world.scoring import score_answer, score_picture

__all__ = ["Pictures", "Questions"]  # the entry points

ATTRIBUTES: Final = ("background", "missing", "extra", "size", "colour", "shape")
"""In what a picture can be wrong, as `samples.world.scoring` names it."""
TRIES: Final = 4
"""Held-out questions offered for each one compared, since a model may be unable to read some."""
OTHERS: Final = (
    "a photograph of an old lighthouse on a cliff at sunset, waves below",
    "portrait of an elderly fisherman in a yellow raincoat, soft light",
    "a bowl of ripe oranges on a wooden table, oil painting",
    "a crowded street market at night in the rain, neon reflections",
    "a watercolour of snowy mountains behind a frozen lake",
    "a small red bicycle leaning against a white brick wall",
    "an isometric drawing of a tidy workshop with many tools",
    "close-up of a green frog on a leaf, macro photography",
)
"""Prompts from outside the world, which users also send."""


def fingerprint_of(folder: Path, components: Sequence[str]) -> str:
    """What a build calls the checkpoint in `folder`. Raises NotFound or SourceError where a component is missing."""
    return key_of({name: open_component(folder / name).fingerprint for name in components})


class SampleExam(Exam):
    """The exam of the checkpoint `folder` beside this file, which has these components."""

    folder: ClassVar[str]
    components: ClassVar[tuple[str, ...]]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(Path(__file__).parent / self.folder, self.components)

    def is_of(self, folder: Path) -> bool:
        try:
            return fingerprint_of(folder, self.components) == self.fingerprint
        except (NotFound, SourceError):
            return False

    @property
    def key(self) -> str:
        """Of the world's files besides this one."""
        world = sorted((Path(__file__).parent / "world").glob("*.py"))
        return key_of(super().key, *(file.read_text() for file in world))


class Pictures(SampleExam):
    """Scenes to draw: right only if every attribute of every thing is."""

    title = "prompts drawn right"
    size = 500
    folder = "shapes-diffusion"
    components = ("text_encoder", "unet", "vae")

    def calibration(self, seed: int) -> Iterator[ImageRequest]:
        """Captions that are not held out, and prompts from outside the world, in turn."""
        rng = np.random.default_rng(seed)
        captions = [scene.caption for scene in picture_scenes() if not held_out(scene.caption)]
        for i in count():
            yield ImageRequest(OTHERS[i // 2 % len(OTHERS)] if i % 2 else captions[rng.integers(len(captions))])

    def comparison(self, count: int, seed: int) -> Iterator[ImageRequest]:
        return (ImageRequest(scene.caption) for scene in test_prompts(count, seed))

    def cases(self, count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
        """Each drawn from its number as seed."""
        return [
            Case(ImageRequest(scene.caption, seed=number), partial(judge_picture, scene))
            for number, scene in enumerate(test_prompts(count, seed, held))
        ]


class Questions(SampleExam):
    """Questions about scenes and words, each with one right answer."""

    title = "questions answered right"
    size = 1000
    folder = "shapes-vlm"
    components = ("",)

    def calibration(self, seed: int) -> Iterator[ChatRequest]:
        rng = np.random.default_rng(seed)
        while True:
            scene = draw_scene(rng)
            questions = scene_questions(scene, rng)
            chosen = questions[rng.integers(len(questions))]
            yield question(render(scene, rng), chosen.text)

    def comparison(self, count: int, seed: int) -> Iterator[ChatRequest]:
        """Every kind of question in turn."""
        return (question(case.picture, case.question) for case in test_questions(TRIES * count, seed))

    def cases(self, count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
        return [
            Case(question(case.picture, case.question), judge_answer(case.kind, case.answer))
            for case in test_questions(count, seed, held)
        ]


def judge_picture(scene: Scene, picture: Picture) -> Judged:
    """A picture, uint8 RGB [edge, edge, 3], of a scene; its parts are the attributes that it shows."""
    score = score_picture(picture, scene)
    return Judged(bool(score), {name: name not in score.wrong for name in ATTRIBUTES if score.tells(name)})


def judge_answer(kind: str, expected: str) -> Callable[[Any], Judged]:
    """A judge of answers to a question of this kind."""

    def judge(answer: str) -> Judged:
        right = score_answer(answer, expected)
        return Judged(right, {kind: right})

    return judge
