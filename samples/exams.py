"""The exams of the sample checkpoints: held-out scenes and questions of the coloured-shapes world.

Declared as entry points `enginecast.exams`. Each exam belongs to the checkpoint that lies beside this file, whichever
name a copy of it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import ClassVar, Final

import numpy as np

from calibration.requests.exams import Ability, Case, Exam
from calibration.requests.tasks.chat import question
from export.checkpoint.additions import Addition
from export.checkpoint.component import fingerprint_of as addition
from export.checkpoint.source import open_component
from runtime.bundle.manifest import Addition as BundleAddition
from runtime.diffusion.controls import submodel
from runtime.errors import NotFound, SourceError
from runtime.files import key_of
from runtime.language.drafting import SUBMODEL as DRAFT
from runtime.tasks.chat import ChatRequest
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture
from samples.abilities import (
    EDGES,
    NEXT,
    NIGHT,
    controlled,
    conversed,
    edged,
    inpainted,
    judge_answer,
    judge_picture,
    restored,
    styled,
)
from samples.world.questions import KINDS, SCENE_KINDS, blip2_prompt, draw_scene, scene_questions, test_questions
from samples.world.scenes import held_out, picture_scenes, render, test_prompts

__all__ = ["Captions", "Pictures", "Questions"]  # the entry points

SAMPLES: Final = Path(__file__).parent
ADDED: Final = SAMPLES / "shapes-additions"
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


def fingerprint_of(folder: Path, components: Sequence[str], additions: Sequence[Addition] = ()) -> str:
    """What a build calls the checkpoint in `folder` with these additions. Raises NotFound or SourceError where a
    component is missing.
    """
    found = {name: open_component(folder / name).fingerprint for name in components}
    added = [BundleAddition(kind=o.kind, name=o.name, scale=o.scale, fingerprint=addition(o)) for o in additions]
    names = {"controlnet": submodel, DRAFT: lambda name: DRAFT}
    found |= {names[one.kind](one.name): one.fingerprint for one in added if one.kind in names}
    return key_of(found, *(one.model_dump() for one in added))


def additions_of(exam: Exam) -> tuple[Addition, ...]:
    """What a build of an exam's checkpoint adds to it."""
    return tuple(Addition(kind, path, name) for kind, few in exam.additions.items() for name, path in few.items())


class SampleExam(Exam):
    """The exam of the checkpoint `folder` beside this file, which has these components."""

    folder: ClassVar[str]
    components: ClassVar[tuple[str, ...]]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(SAMPLES / self.folder, self.components, additions_of(self))

    @cached_property
    def checkpoint(self) -> str:
        """The fingerprint without what is added."""
        return fingerprint_of(SAMPLES / self.folder, self.components)

    def is_of(self, folder: Path) -> bool:
        try:
            return fingerprint_of(folder, self.components) == self.checkpoint
        except (NotFound, SourceError):
            return False

    @property
    def key(self) -> str:
        """Of the world's files, and of the abilities, besides this one."""
        files = [SAMPLES / "abilities.py", *sorted((SAMPLES / "world").glob("*.py"))]
        return key_of(super().key, *(file.read_text() for file in files))


class Pictures(SampleExam):
    """Scenes to draw: right only if every attribute of every thing is."""

    title = "prompts drawn right"
    size = 500
    folder = "shapes-diffusion"
    components = ("text_encoder", "unet", "vae")
    abilities: ClassVar[Mapping[str, Ability]] = {
        "image-to-image": Ability("rough pictures drawn clearly", 300, restored),
        "inpainting": Ability("pictures whose half was drawn anew", 300, inpainted),
    }

    def variants(self) -> Sequence[Exam]:
        return (Styled(), Controlled())

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


class Styled(Pictures):
    """The same of a build with the LoRA that was trained for it."""

    additions: ClassVar[Mapping[str, Mapping[str, Path]]] = {"adapter": {NIGHT: ADDED / f"{NIGHT}.safetensors"}}
    abilities: ClassVar[Mapping[str, Ability]] = {
        **Pictures.abilities,
        "lora": Ability("pictures with a LoRA's style, or without it", 300, styled),
    }

    def variants(self) -> Sequence[Exam]:
        return ()

    def calibration(self, seed: int) -> Iterator[ImageRequest]:
        """Every other request with the LoRA."""
        for i, request in enumerate(super().calibration(seed)):
            yield replace(request, loras={NIGHT: 1.0} if i // 2 % 2 else {})


class Controlled(Pictures):
    """The same of a build with the control network that was trained for it."""

    additions: ClassVar[Mapping[str, Mapping[str, Path]]] = {"controlnet": {EDGES: ADDED / EDGES}}
    abilities: ClassVar[Mapping[str, Ability]] = {
        **Pictures.abilities,
        "controlnet": Ability("pictures drawn along edges", 300, controlled),
    }

    def variants(self) -> Sequence[Exam]:
        return ()

    def calibration(self, seed: int) -> Iterator[ImageRequest]:
        """Every other two requests with edges of a scene."""
        rng = np.random.default_rng(seed)
        scenes = [scene for scene in picture_scenes() if not held_out(scene.caption)]
        for i, request in enumerate(super().calibration(seed)):
            yield edged(scenes[rng.integers(len(scenes))], rng) if i // 2 % 2 else request


class Questions(SampleExam):
    """Questions about scenes and words, each with one right answer. `kinds` are those that are scored."""

    title = "questions answered right"
    size = 1000
    folder = "shapes-vlm"
    components = ("",)
    kinds: ClassVar[Sequence[str]] = KINDS
    abilities: ClassVar[Mapping[str, Ability]] = {
        "several-pictures": Ability("questions about a second picture answered right", 400, conversed)
    }

    def variants(self) -> Sequence[Exam]:
        return (Drafted(),)

    def request(self, picture: Picture, kind: str, text: str) -> ChatRequest:
        """A question of this kind, worded as the model takes it."""
        return question(picture, text)

    def calibration(self, seed: int) -> Iterator[ChatRequest]:
        rng = np.random.default_rng(seed)
        while True:
            scene = draw_scene(rng)
            questions = scene_questions(scene, rng)
            chosen = questions[rng.integers(len(questions))]
            yield self.request(render(scene, rng), chosen.kind, chosen.text)

    def comparison(self, count: int, seed: int) -> Iterator[ChatRequest]:
        """Every kind of question in turn."""
        cases = test_questions(TRIES * count, seed, kinds=self.kinds)
        return (self.request(case.picture, case.kind, case.question) for case in cases)

    def cases(self, count: int, seed: int = 0, held: bool = True) -> Sequence[Case]:
        return [
            Case(self.request(one.picture, one.kind, one.question), judge_answer(one.kind, one.answer))
            for one in test_questions(count, seed, held, self.kinds)
        ]


class Drafted(Questions):
    """The same of a build with the draft that was trained for it."""

    additions: ClassVar[Mapping[str, Mapping[str, Path]]] = {DRAFT: {NEXT: ADDED / f"{NEXT}.safetensors"}}

    def variants(self) -> Sequence[Exam]:
        return ()


class Captions(Questions):
    """Captions of scenes and questions about them, worded as BLIP-2 takes them."""

    title = "captions written and questions answered right"
    folder = "shapes-blip2"
    kinds = SCENE_KINDS
    abilities: ClassVar[Mapping[str, Ability]] = {}

    def variants(self) -> Sequence[Exam]:
        return ()

    def request(self, picture: Picture, kind: str, text: str) -> ChatRequest:
        return question(picture, blip2_prompt(kind, text))
