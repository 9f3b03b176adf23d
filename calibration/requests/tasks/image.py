"""Drawing: general prompts, written for this package, and how requests are made of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

from calibration.requests.pictures import shown
from calibration.requests.task import Beside, TaskRequests
from runtime.bundle.signature import Array
from runtime.diffusion.canvas import normalized
from runtime.diffusion.config import DiffusionConfig
from runtime.diffusion.guides import Control, Style
from runtime.errors import InvalidInput
from runtime.pipeline import Call, Event
from runtime.tasks.image import ImageReady, ImageRequest
from runtime.vision.images import Picture, resized
from runtime.vision.preprocessing import Edge, ImagePreprocessor, Size

VAE_ENCODER: Final = "vae_encoder"
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

    def fitted(self, config: Mapping[str, Any], request: ImageRequest) -> ImageRequest:
        """Every other request has a picture for each control network and image adapter: a model with them is used with
        and without. Every one has a picture and a mask where the model is for inpainting.
        """
        parsed, seed = DiffusionConfig.parse(config), request.seed or 0
        request = masked(parsed, request)
        if seed % 2:
            return request
        edge, found = parsed.sizes.default, request
        if parsed.controls is not None and not request.controls:
            shown = edges(edge, seed)
            found = replace(found, controls=tuple(Control(name, shown) for name in parsed.controls.names))
        if parsed.styles is not None and not request.styles:
            pictures = [colors(edge, seed + index) for index in range(len(parsed.styles.names))]
            found = replace(found, styles=tuple(map(Style, parsed.styles.names, pictures)))
        return found

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

    def beside(self, config: Mapping[str, Any], picture: Picture | None, name: str) -> tuple[Sequence[Call], Beside]:
        """The VAE encoder gets the request's picture, else the one that was drawn: no request encodes it by itself."""
        if picture is None:
            return (), _drawn
        edge = DiffusionConfig.parse(config).sizes.default
        return (_encoding(_fitted(edge)([picture], name)),), lambda event: ()

    def uncovered(self, positions: Mapping[str, Sequence[int]]) -> list[str]:
        found = []
        for submodel, counts in positions.items():
            missing = [str(step) for step, count in enumerate(counts, start=1) if not count]
            if missing:
                where = f"no input of {submodel} at step {', '.join(missing)} of {len(counts)}"
                found.append(f"noise levels are not covered: {where}")
        return found

    def result(self, events: Iterable[Event]) -> Picture:
        """The one picture, uint8 RGB [height, width, 3]."""
        (ready,) = (event for event in events if isinstance(event, ImageReady))
        return ready.image.astype(np.uint8, copy=False)


def masked(config: DiffusionConfig, request: ImageRequest) -> ImageRequest:
    """The request as a model takes it: of one for inpainting with a picture, of which the right half is drawn."""
    if not config.inpainting or request.masked:
        return request
    edge = config.sizes.default
    picture = resized(shown((request.seed or 0) + 1), (edge, edge), Image.Resampling.LANCZOS)
    mask = np.zeros_like(picture)
    mask[:, edge // 2 :] = 255
    return replace(request, image=picture, mask=mask)


def edges(edge: int, seed: int) -> Picture:
    """White outlines on black, uint8 RGB [edge, edge, 3]: what many control networks are shown."""
    rng, picture = np.random.default_rng(seed), Image.new("RGB", (edge, edge))
    draw = ImageDraw.Draw(picture)
    for shape in (draw.ellipse, draw.rectangle) * 4:
        (left, right), (top, bottom) = np.sort(rng.integers(0, edge, (2, 2)), axis=1).tolist()
        shape((left, top, right, bottom), outline="white")
    return np.asarray(picture)


def colors(edge: int, seed: int) -> Picture:
    """Areas of colors that run into each other, uint8 RGB [edge, edge, 3]."""
    few = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(few).resize((edge, edge), Image.Resampling.BICUBIC))


def _drawn(event: Event) -> list[Call]:
    """A picture that was drawn, uint8 RGB [height, width, 3], for the VAE encoder."""
    if not isinstance(event, ImageReady):
        return []
    return [_encoding(normalized(event.image.astype(np.uint8, copy=False))[None])]


def _encoding(pixels: Array) -> Call:
    """`pixels` float32 [1, 3, height, width] in -1..1."""
    return Call(VAE_ENCODER, {"image": pixels})


def _fitted(edge: int) -> ImagePreprocessor:
    """Pictures as a VAE takes them: resized and cut to a square, in -1..1."""
    half = (0.5, 0.5, 0.5)
    return ImagePreprocessor.model_validate(
        {
            "size": Edge(shortest_edge=edge),
            "crop_size": Size(height=edge, width=edge),
            "image_mean": half,
            "image_std": half,
        }
    )


TASK: Final = ImageRequests()
