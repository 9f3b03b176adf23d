"""The pictures that img2img draws on: shapes, masks, what is filled, and what of the whole picture stays."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from PIL.ExifTags import Base as Tag

from runtime.vision.images import Picture, decoded
from tests.fakes.proofs import proves
from tests.serving.dialects.a1111.conftest import SHADES, Studio, b64

PATH = "/sdapi/v1/img2img"
GREY = np.full((32, 48, 3), 90, np.uint8)


def mask(box: tuple[int, int, int, int] = (16, 8, 32, 24)) -> Picture:
    left, top, right, bottom = box
    found = np.zeros((32, 48, 3), np.uint8)
    found[top:bottom, left:right] = 255
    return found


def answer(studio: Studio, **fields: Any) -> Picture:
    """The picture of a response."""
    status, content = studio.post(PATH, {"init_images": [b64(SHADES)], "steps": 1, **fields})
    assert status == 200, content
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content["images"][0]))))


@proves("POST /sdapi/v1/img2img", "init_images", "denoising_strength", "resize_mode")
def test_shapes(studio: Studio) -> None:
    found = studio.draw(PATH, denoising_strength=0.25)
    assert np.array_equal(decoded(found.image), SHADES) and found.strength == 0.25
    assert studio.draw(PATH).strength is None
    size = {"width": 64, "height": 64}
    assert np.array_equal(decoded(studio.draw(PATH, resize_mode=0, **size).image), SHADES)
    assert np.array_equal(decoded(studio.draw(PATH, resize_mode=1, **size).image), SHADES[:, 8:40])
    padded = decoded(studio.draw(PATH, resize_mode=2, **size).image)
    assert padded.shape == (48, 48, 3) and np.array_equal(padded[8:40], SHADES) and (padded[:8] == SHADES[0]).all()
    same = decoded(studio.draw(PATH, resize_mode=2, width=96, height=64).image)
    assert np.array_equal(same, SHADES)
    why = studio.refused(PATH, resize_mode=3)
    assert why.startswith("resize_mode: is 3, expected 0 (just resize)")
    assert studio.refused(PATH, resize_mode=1, width=64).startswith("resize_mode: is 1, which needs width and height")
    wide = studio.refused(PATH, resize_mode=2, width=60_000_000, height=1)
    assert wide.startswith("resize_mode: has ") and "pixels, expected at most" in wide


@proves("POST /sdapi/v1/img2img", "mask", "mask_blur", "inpainting_mask_invert", "inpainting_fill", "inpaint_full_res")
def test_the_whole_picture_with_a_mask(studio: Studio) -> None:
    whole = {"inpaint_full_res": False, "inpainting_fill": 1, "mask_blur": 0}
    found = studio.draw(PATH, mask=b64(mask()), **whole)
    assert np.array_equal(decoded(found.image), SHADES) and np.array_equal(found.mask, mask())
    assert found.keep_unmasked is None and found.mask_blur is None
    assert np.array_equal(studio.draw(PATH, mask=b64(mask()), inpainting_mask_invert=1, **whole).mask, 255 - mask())
    soft = Image.fromarray(mask()[..., 0]).filter(ImageFilter.GaussianBlur(3))
    blurred = studio.draw(PATH, mask=b64(mask()), **{**whole, "mask_blur": 3}).mask
    assert np.array_equal(blurred[..., 0], np.asarray(soft))
    cropped = studio.draw(PATH, mask=b64(mask()), resize_mode=1, width=8, height=8, **whole)
    assert np.array_equal(cropped.mask, mask()[:, 8:40])


@proves("POST /sdapi/v1/img2img", "mask_blur_x", "mask_blur_y")
def test_blur_of_one_direction(studio: Studio) -> None:
    whole = {"inpaint_full_res": False, "inpainting_fill": 1}
    found = studio.draw(PATH, mask=b64(mask()), mask_blur_x=0, mask_blur_y=2, **whole).mask[..., 0]
    assert len(np.unique(found[12])) == 2 and len(np.unique(found[:, 20])) > 2
    assert studio.refused(PATH, mask=b64(mask()), mask_blur_x=300).startswith("mask_blur_x: is 300")
    assert studio.refused(PATH, mask=b64(mask()), mask_blur=-1).startswith("mask_blur: is -1")


def test_a_filled_part(studio: Studio) -> None:
    """Colours of around are spread into the masked part, and the rest comes back as it was."""
    studio.fake.draw.picture = GREY
    fields = {"mask": b64(mask()), "mask_blur": 0, "inpaint_full_res": False}
    out = answer(studio, **fields)
    found = studio.requests[-1]
    drawn = mask()[..., 0] == 255
    assert np.array_equal(found.image[~drawn], SHADES[~drawn]) and not np.array_equal(found.image, SHADES)
    around = SHADES[4:28, 12:36].astype(int)
    assert found.image[drawn].min() >= around.min() - 2 and found.image[drawn].max() <= around.max() + 2
    assert (out[drawn] == 90).all() and np.array_equal(out[~drawn], SHADES[~drawn])
    for number, fill in ((2, "noise"), (3, "nothing")):
        latents = studio.draw(PATH, **{**fields, "inpainting_fill": number})
        assert latents.mask_fill == fill and np.array_equal(latents.image, SHADES) and latents.keep_unmasked is None
    why = studio.refused(PATH, **{**fields, "inpainting_fill": 4})
    assert why.startswith("inpainting_fill: is 4, expected 0 (fill), 1 (original), 2 (latent noise)")


@proves("POST /sdapi/v1/img2img", "inpaint_full_res_padding")
def test_only_the_masked_part(studio: Studio) -> None:
    """It is drawn at the full size, and put back into the whole picture."""
    studio.fake.draw.picture = np.full((64, 64, 3), 90, np.uint8)
    box = mask((30, 10, 38, 14))
    fields = {"mask": b64(box), "mask_blur": 0, "inpainting_fill": 1, "width": 64, "height": 64}
    out = answer(studio, inpaint_full_res_padding=2, **fields)
    found = studio.requests[-1]
    assert np.array_equal(found.image, SHADES[6:18, 28:40]) and np.array_equal(found.mask, box[6:18, 28:40])
    assert (found.width, found.height, found.keep_unmasked) == (64, 64, False)
    drawn = box[..., 0] == 255
    assert (out[drawn] == 90).all() and np.array_equal(out[~drawn], SHADES[~drawn])
    corner = studio.draw(PATH, **{**fields, "mask": b64(mask((44, 0, 48, 8)))})
    assert corner.image.shape == (8, 8, 3) and np.array_equal(corner.image, SHADES[:8, 40:])
    nothing = studio.refused(PATH, **{**fields, "mask": b64(np.zeros_like(SHADES))})
    assert nothing.startswith("mask: leaves nothing to draw")


def test_a_transparent_mask(studio: Studio) -> None:
    """As in the web UI, what is opaque is drawn, whatever its colour."""
    rgba = np.zeros((32, 48, 4), np.uint8)
    rgba[8:24, 16:32, 3] = 255
    out = io.BytesIO()
    Image.fromarray(rgba).save(out, "PNG")
    whole = {"mask_blur": 0, "inpaint_full_res": False, "inpainting_fill": 1}
    text = base64.b64encode(out.getvalue()).decode()
    assert np.array_equal(studio.draw(PATH, mask=text, **whole).mask, mask())
    turned, exif = io.BytesIO(), Image.Exif()
    exif[Tag.Orientation] = 6
    Image.fromarray(np.rot90(rgba)).save(turned, "PNG", exif=exif)
    text = base64.b64encode(turned.getvalue()).decode()
    assert np.array_equal(studio.draw(PATH, mask=text, **whole).mask, mask())


@proves("POST /sdapi/v1/img2img", "include_init_images")
def test_pictures_are_sent_back_only_if_asked(studio: Studio) -> None:
    body = {"init_images": [b64(SHADES)], "steps": 1}
    assert "init_images" not in studio.post(PATH, body)[1]["parameters"]
    assert studio.post(PATH, {**body, "include_init_images": True})[1]["parameters"]["init_images"] == [b64(SHADES)]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"mask": b64(SHADES[:8])}, "mask: is 48x8 pixels, expected 48x32, the size of init_images"),
        ({"init_images": [b64(SHADES)] * 2}, "init_images: holds several pictures"),
        ({"inpainting_mask_invert": 2, "mask": b64(SHADES)}, "inpainting_mask_invert: is 2"),
        ({"mask": "?"}, "mask: is no base64"),
        ({"denoising_strength": 1.5}, "denoising_strength: is 1.5, expected 0 to 1"),
        ({"latent_mask": "x"}, "latent_mask: send mask"),
        ({"initial_noise_multiplier": 1.1}, "initial_noise_multiplier: "),
        ({"mask_round": False}, "mask_round: "),
        ({"inpaint_full_res_padding": -1, "mask": b64(SHADES)}, "inpaint_full_res_padding: is -1"),
    ],
)
def test_what_is_refused(studio: Studio, fields: Any, why: str) -> None:
    assert studio.refused(PATH, **fields).startswith(why)


def test_the_client_library_paints_into_a_picture(studio: Studio) -> None:
    """With its own values of every field."""
    studio.fake.draw.picture = np.full((64, 64, 3), 90, np.uint8)
    picture = Image.fromarray(SHADES)
    result = studio.api.img2img(images=[picture], mask_image=Image.fromarray(mask()), prompt="a", steps=1, mask_blur=0)
    out, drawn = np.asarray(result.image), mask()[..., 0] == 255
    assert (out[drawn] == 90).all() and np.array_equal(out[~drawn], SHADES[~drawn])
    assert "Masked content: fill, Inpaint area: Only masked" in result.info["infotexts"][0]
    whole = studio.api.img2img(images=[picture], prompt="a", steps=1, denoising_strength=0.5, width=48, height=32)
    assert whole.info["denoising_strength"] == 0.5 and studio.requests[-1].strength == 0.5
