"""Requests for pictures as messages, and back."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.diffusion.guides import Control, Style
from runtime.diffusion.hires import Hires
from runtime.errors import InvalidInput
from runtime.tasks.image import CONDITIONS, ImageReady, ImageRequest
from runtime.vision.images import PictureFile, decoded
from serving.dialects.grpc.tasks.image import ImageStream, image_events, image_message, image_request
from serving.dialects.python import requests
from serving.enginecast_pb import image_pb2

PICTURE = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
MASK = np.zeros((8, 12), np.uint8)
MASK[2:4] = 255


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "jpeg")
    return file.getvalue()


def test_what_is_drawn_on_comes_through() -> None:
    options: dict[str, Any] = {
        "image": PICTURE,
        "strength": 0.0,
        "mask": MASK,
        "mask_blur": 2.5,
        "keep_unmasked": False,
    }
    made = requests.image_request("a fox", options | {"extend": (1, 2, 3, 4)})
    received = image_request(image_pb2.GenerateRequest.FromString(image_message("m", made).SerializeToString()))
    assert isinstance(received.image, PictureFile) and isinstance(received.mask, PictureFile)
    np.testing.assert_array_equal(decoded(received.image), PICTURE)
    np.testing.assert_array_equal(decoded(received.mask), np.repeat(MASK[..., None], 3, axis=2))
    assert (received.strength, received.mask_blur, received.keep_unmasked) == (0.0, 2.5, False)
    assert received.extend == (1, 2, 3, 4)
    assert received.nbytes == len(received.image.data) + len(received.mask.data)


def test_latents_come_through_both_ways() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 3, 5), np.float32)
    made = requests.image_request("a fox", {"denoising_start": 0.8, "latents": latents, "images": 2})
    received = image_request(image_pb2.GenerateRequest.FromString(image_message("m", made).SerializeToString()))
    assert received.latents is not None and received.denoising_start == 0.8 and received.nbytes == latents.nbytes
    np.testing.assert_array_equal(received.latents, latents)
    ready = ImageReady(PICTURE, 1, 7, latents[1])
    response = ImageStream().response(ready)
    assert response is not None
    (again,) = image_events(iter([response]))
    assert isinstance(again, ImageReady) and again.latents is not None and (again.index, again.seed) == (1, 7)
    np.testing.assert_array_equal(again.latents, latents[1])


def test_conditions_come_through() -> None:
    pairs = {name: (2 * i, 2 * i + 1) for i, name in enumerate(CONDITIONS) if not name.endswith("score")}
    stated = {**pairs, "aesthetic_score": 7.5, "negative_aesthetic_score": 0.0}
    made = requests.image_request("a fox", stated)
    received = image_request(image_pb2.GenerateRequest.FromString(image_message("m", made).SerializeToString()))
    assert received.conditions == made.conditions == stated and len(stated) == 8


def test_a_second_pass_and_changed_noise_come_through() -> None:
    hires = Hires(width=64, upscaler="lanczos", steps=3, strength=0.5, prompt="", sampler="euler")
    stated = {"variation_seed": 2**40, "variation_strength": 0.25, "noise_size": (16, 24), "hires": hires}
    made = requests.image_request("a fox", stated)
    received = image_request(image_pb2.GenerateRequest.FromString(image_message("m", made).SerializeToString()))
    assert {name: getattr(received, name) for name in stated} == stated and received.hires == hires
    masked = requests.image_request("a fox", {"image": PICTURE, "mask": MASK, "mask_fill": "noise"})
    assert image_request(image_message("m", masked)).mask_fill == "noise"


def test_guess_mode_comes_through() -> None:
    request = ImageRequest("x", controls=(Control("edges", PICTURE),), guess_mode=True)
    assert image_request(image_message("model", request)).guess_mode
    with pytest.raises(InvalidInput, match="guess_mode: is of controls: give some, or leave it out"):
        image_request(image_pb2.GenerateRequest(prompt="x", guess_mode=True))


def test_a_part_of_the_guidance_comes_through() -> None:
    received = image_request(image_message("m", ImageRequest("x", guidance_start=0.0, guidance_end=0.75)))
    assert (received.guidance_start, received.guidance_end, received.guided) == (0.0, 0.75, (0.0, 0.75))
    with pytest.raises(InvalidInput, match=r"guidance_start: is .*, expected less than guidance_end, which is"):
        image_request(image_pb2.GenerateRequest(prompt="x", guidance_start=0.5, guidance_end=0.5))


def test_a_forecast_comes_through() -> None:
    assert image_request(image_message("m", ImageRequest("x", forecast="1-3,6"))).forecast == "1-3,6"
    with pytest.raises(InvalidInput, match="forecast: has 1,001 characters, expected at most 1,000"):
        image_request(image_pb2.GenerateRequest(prompt="x", forecast="1" * 1001))


def test_a_file_is_sent_as_it_is() -> None:
    made = requests.image_request("a fox", {"image": jpeg()})
    assert image_message("m", made).image == jpeg()


def test_what_is_not_set_stays_open() -> None:
    received = image_request(image_message("m", ImageRequest("a fox")))
    assert (received.image, received.strength, received.mask, received.extend) == (None,) * 4
    assert received.keep_unmasked is None and received.mask_blur is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image": b"no picture"}, "image"),
        ({"image": jpeg(), "mask": b""}, "mask"),
        ({"image": b""}, "image"),
        ({"strength": 0.5}, "strength"),
        ({"image": jpeg(), "extend": image_pb2.Edges()}, "extend"),
        ({"latents": [image_pb2.Latents(channels=4, height=1, width=1, values=bytes(15))]}, "latents[0]"),
        ({"latents": [image_pb2.Latents(channels=2**32 - 1, height=2**32 - 1, width=2**32 - 1)]}, "latents[0]"),
        (
            {"latents": [image_pb2.Latents(channels=1, height=1, width=n, values=bytes(4 * n)) for n in (1, 2)]},
            "latents",
        ),
        ({"latents": [image_pb2.Latents()] * 65}, "latents"),
        ({"denoising_start": 0.5}, "denoising_start"),
        ({"denoising_end": 1.0}, "denoising_end"),
        ({"denoising_end": 0.5, "image": jpeg()}, "image"),
        ({"image": jpeg(), "extend": image_pb2.Edges(left=2**32 - 1)}, "extend"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        image_request(image_pb2.GenerateRequest(prompt="a fox", **fields))
    assert caught.value.field == named


def test_controls_are_sent_as_files() -> None:
    request = ImageRequest("x", controls=(Control("edges", PICTURE, 0.5, 0.25, 0.75), Control("depth", PICTURE)))
    got = image_request(image_message("model", request))
    assert [(c.name, c.scale, c.start, c.end) for c in got.controls] == [("edges", 0.5, 0.25, 0.75), ("depth", 1, 0, 1)]
    assert all((decoded(control.image) == PICTURE).all() for control in got.controls)
    assert got.nbytes == sum(len(c.image.data) for c in got.controls if isinstance(c.image, PictureFile)) > 0


def test_a_control_that_leaves_numbers_open_counts_fully() -> None:
    sent = image_message("model", ImageRequest("x", controls=(Control("edges", PICTURE),)))
    bare = image_pb2.Control(name="edges", image=sent.controls[0].image)
    (control,) = image_request(image_pb2.GenerateRequest(prompt="x", controls=[bare])).controls
    assert (control.scale, control.start, control.end) == (1, 0, 1)


def test_a_control_without_a_picture() -> None:
    message = image_pb2.GenerateRequest(prompt="x", controls=[image_pb2.Control(name="edges")])
    with pytest.raises(InvalidInput, match="controls: "):
        image_request(message)


def test_styles_are_sent_as_files() -> None:
    got = image_request(image_message("model", ImageRequest("x", styles=(Style("style", PICTURE, 0.5),))))
    (style,) = got.styles
    assert (style.name, style.scale) == ("style", 0.5) and (decoded(style.image) == PICTURE).all() and got.nbytes > 0
    bare = image_pb2.Style(name="style", image=image_message("model", got).styles[0].image)
    (again,) = image_request(image_pb2.GenerateRequest(prompt="x", styles=[bare])).styles
    assert again.scale == 1
