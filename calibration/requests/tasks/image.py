"""Drawing: general prompts, written for this package, and how requests are made of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Final

import numpy as np

from calibration.requests.task import TaskRequests
from runtime.errors import InvalidInput
from runtime.pipeline import Event
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture

STEPS: Final = 12
BRIEF_STEPS: Final = (3, 4, 5)
"""Steps of brief requests, in turn: of three requests, twelve calls, each at a noise level of its own."""

BLURRED: Final = "blurry, low quality, jpeg artifacts"
DEFORMED: Final = "extra fingers, deformed hands, cropped, watermark, text"
PROMPTS: Final[tuple[tuple[str, str], ...]] = (
    ("a photograph of an old lighthouse on a cliff at sunset, waves below", ""),
    ("portrait of an elderly fisherman in a yellow raincoat, soft light", DEFORMED),
    ("a bowl of ripe oranges on a wooden table, oil painting", ""),
    ("product photo of a matte black espresso machine on a white background, studio lighting", BLURRED),
    ("a hand-painted shop sign that reads OPEN", ""),
    ("abstract composition of overlapping translucent circles in ochre and teal", ""),
    ("ein altes Fachwerkhaus im Nebel, Herbst", ""),
    ("cat", ""),
    ("a crowded street market at night in the rain, neon reflections", BLURRED),
    ("a watercolour of snowy mountains behind a frozen lake", ""),
    ("close-up of a green frog on a leaf, macro photography, shallow depth of field", ""),
    ("head and shoulders of a smiling woman with curly hair, film grain, 85mm", DEFORMED),
    (
        "a vast valley at first light with a winding river, terraced rice fields on both sides, a small village with "
        "smoke rising from its chimneys, pine forests on the slopes and a snow-covered peak far away, highly detailed",
        "",
    ),
    ("un plato de paella con gambas, vista cenital", ""),
    ("an isometric drawing of a tidy workshop with many tools", ""),
    ("a book cover with the title NORTH WIND in bold letters above a sailing ship", ""),
    ("a pair of red running shoes on concrete, advertising photo", ""),
    ("pencil sketch of a dancer mid-leap", DEFORMED),
    ("une rue de Paris sous la pluie, style impressionniste", ""),
    ("a small red bicycle leaning against a white brick wall", ""),
    ("fractal landscape, glowing edges, dark background", ""),
    ("golden hour over dunes", BLURRED),
    ("a child's crayon drawing of a house with a sun", ""),
    ("古い寺の庭, 桜, 水彩画", ""),
    ("a glass bottle of perfume with gold cap, reflections, minimal", ""),
    ("an astronaut riding a horse on the moon, cinematic", ""),
    ("group photo of five people on a beach, midday", DEFORMED),
    ("pixel art of a castle with a moat", ""),
    ("a poster that says WELCOME HOME in handwritten letters, flowers around it", BLURRED),
    ("um gato preto dormindo numa janela", ""),
    ("black and white photograph of an empty railway station", ""),
    ("marble texture, white and grey, seamless", ""),
)
"""Prompts and what to steer away from.

Photographs, paintings, drawings, products, portraits, landscapes, written text, abstract ones, in several languages,
short and long. Each eight in a row hold most of these.
"""


class ImageRequests(TaskRequests):
    """Requests that draw a picture."""

    name = "image"
    calls = STEPS
    brief_calls = sum(BRIEF_STEPS) / len(BRIEF_STEPS)

    def general(self, seed: int) -> Iterator[ImageRequest]:
        """`PROMPTS` in turn, from a place that the seed says."""
        for i in count(8 * seed):
            prompt, negative = PROMPTS[i % len(PROMPTS)]
            yield ImageRequest(prompt, negative)

    def calibrating(self, request: ImageRequest, number: int, seed: int) -> ImageRequest:
        return replace(request, steps=STEPS, seed=seed + number)

    def brief(self, request: ImageRequest, number: int) -> ImageRequest:
        return replace(request, steps=BRIEF_STEPS[number % len(BRIEF_STEPS)])

    def of_prompt(self, text: str, number: int) -> ImageRequest:
        return ImageRequest(text)

    def of_picture(self, picture: Picture, caption: Callable[[], str], number: int) -> tuple[ImageRequest, Picture]:
        return ImageRequest(caption()), picture

    def of_question(self, picture: Picture, question: str) -> ImageRequest:
        raise AssertionError("check_questions refuses them")

    def check_questions(self) -> None:
        raise InvalidInput(
            "questions", "are for models that chat, and this one draws: give it --prompts, or --images with captions"
        )

    def result(self, events: Iterable[Event]) -> Picture:
        """The one picture, uint8 RGB [height, width, 3]."""
        (ready,) = (event for event in events if isinstance(event, ImageReady))
        return ready.image.astype(np.uint8, copy=False)


TASK: Final = ImageRequests()
