"""Parameters of a picture as the text of its PNG file."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from runtime.diffusion.infotext import KEY, infotext
from runtime.tasks.image import ImageRequest
from runtime.vision.images import encode_image


def test_the_text_of_a_picture() -> None:
    request = ImageRequest(
        "a red circle\non white",
        negative_prompt="blue",
        steps=20,
        sampler="euler",
        guidance_scale=7.5,
        loras={"ink": 0.5},
    )
    text = infotext(request, 9, (64, 128), {"X Values": "10,20"})
    assert text == (
        "a red circle\non white\nNegative prompt: blue\nSteps: 20, Sampler: euler, CFG scale: 7.5, Seed: 9, "
        'Size: 128x64, LoRAs: "ink: 0.5", X Values: "10,20"'
    )
    assert infotext(ImageRequest("a", eta=0.5), 1, (8, 8)) == "a\nEta: 0.5, Seed: 1, Size: 8x8"


def test_a_file_has_its_text_in_any_script() -> None:
    picture = np.zeros((2, 2, 3), np.uint8)
    for text in ("plain", "círculo 赤い"):
        with Image.open(io.BytesIO(encode_image(picture, texts={KEY: text}))) as file:
            assert file.info[KEY] == text
