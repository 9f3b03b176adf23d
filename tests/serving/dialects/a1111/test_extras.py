"""Pictures at another size, and the formats of files in responses."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.vision.images import encode_image
from tests.fakes.proofs import proves
from tests.serving.dialects.a1111.conftest import DRAW, SHADES, Studio, b64

PICTURE = Image.fromarray(SHADES)
SINGLE, BATCH = "/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images"


def same(found: Any, expected: Image.Image) -> bool:
    return np.array_equal(np.asarray(found), np.asarray(expected))


@proves("POST /sdapi/v1/extra-single-image", "image", "upscaling_resize", "upscaler_1", "resize_mode", "upscaler_2")
@proves("POST /sdapi/v1/extra-single-image", "extras_upscaler_2_visibility", "upscaling_resize_w", "upscaling_resize_h")
@proves("POST /sdapi/v1/extra-single-image", "upscaling_crop")
def test_the_client_library_enlarges_a_picture(studio: Studio) -> None:
    enlarge = studio.api.extra_single_image
    lanczos, nearest = (PICTURE.resize((96, 64), way) for way in (Image.Resampling.LANCZOS, Image.Resampling.NEAREST))
    assert same(enlarge(PICTURE, upscaler_1="Lanczos").image, lanczos)
    assert same(enlarge(PICTURE, upscaler_1="Nearest").image, nearest)
    both = enlarge(PICTURE, upscaler_1="Lanczos", upscaler_2="Nearest", extras_upscaler_2_visibility=0.25)
    assert same(both.image, Image.blend(lanczos, nearest, 0.25))
    assert same(enlarge(PICTURE, upscaling_resize=4).image, PICTURE), "without an upscaler it stays"
    assert enlarge(PICTURE, upscaling_resize=1.3, upscaler_1="Lanczos").image.size == (56, 40)
    size = {"resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 64, "upscaler_1": "Lanczos"}
    whole = PICTURE.resize((96, 64), Image.Resampling.LANCZOS)
    assert same(enlarge(PICTURE, **size).image, whole.crop((16, 0, 80, 64)))
    assert same(enlarge(PICTURE, upscaling_crop=False, **size).image, whole)


@proves("POST /sdapi/v1/extra-batch-images", "imageList", "imageList[].data", "upscaling_resize", "upscaler_1")
@proves("POST /sdapi/v1/extra-batch-images", "upscaler_2", "extras_upscaler_2_visibility", "resize_mode")
@proves("POST /sdapi/v1/extra-batch-images", "upscaling_resize_w", "upscaling_resize_h", "upscaling_crop")
def test_the_client_library_enlarges_several(studio: Studio) -> None:
    grey = Image.new("RGB", (16, 16), "grey")
    found = studio.api.extra_batch_images([PICTURE, grey], upscaler_1="Nearest").images
    assert [one.size for one in found] == [(96, 64), (32, 32)]
    assert same(found[0], PICTURE.resize((96, 64), Image.Resampling.NEAREST))


def test_parameters_stay(studio: Studio) -> None:
    file = encode_image(SHADES, texts={"parameters": "a\nSteps: 2, Seed: 1, Size: 48x32"})
    status, content = studio.post(SINGLE, {"image": base64.b64encode(file).decode(), "upscaler_1": "Lanczos"})
    assert status == 200
    found = Image.open(io.BytesIO(base64.b64decode(content["image"])))
    assert found.size == (96, 64) and found.info["parameters"].startswith("a\nSteps: 2")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"upscaler_1": "R-ESRGAN 4x+"}, "upscaler_1: 'R-ESRGAN 4x+' is not known here, expected None, Lanczos"),
        ({"upscaler_2": "Latent"}, "upscaler_2: 'Latent' is not known here"),
        ({"gfpgan_visibility": 0.5}, "gfpgan_visibility: there is no model for faces here"),
        ({"codeformer_visibility": 1}, "codeformer_visibility: there is no model for faces here"),
        ({"upscaling_resize": 9}, "upscaling_resize: "),
        ({"resize_mode": 1, "upscaling_resize_w": 0, "upscaler_1": "Lanczos"}, "upscaling_resize_w: is 0"),
        ({"resize_mode": 1, "upscaling_resize_w": 60000, "upscaler_1": "Lanczos"}, "image: has "),
        ({"image": "?"}, "image: is no base64"),
        ({"ghost": 1}, "ghost: is not known here"),
    ],
)
def test_what_cannot_be_enlarged_is_refused(studio: Studio, fields: dict[str, Any], why: str) -> None:
    assert studio.refused(SINGLE, **{"image": b64(SHADES), **fields}).startswith(why)


def test_the_picture_of_a_batch_is_named(studio: Studio) -> None:
    why = studio.refused(BATCH, imageList=[{"data": b64(SHADES)}, {"data": "?", "name": "b"}])
    assert why.startswith("imageList[1].data: is no base64")


def test_all_pictures_of_a_batch_are_counted(studio: Studio) -> None:
    size = {"resize_mode": 1, "upscaling_resize_w": 7680, "upscaling_resize_h": 5120, "upscaler_1": "Nearest"}
    why = studio.refused(BATCH, imageList=[{"data": b64(SHADES), "name": "a"}] * 7, **size)
    assert why.startswith("imageList: has 275,251,200 pixels, expected at most 256,000,000")


@pytest.mark.parametrize("path", DRAW)
@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
@proves("POST /sdapi/v1/txt2img", "override_settings.samples_format", "override_settings.jpeg_quality")
@proves("POST /sdapi/v1/img2img", "override_settings.samples_format", "override_settings.jpeg_quality")
def test_formats_of_files(studio: Studio, path: str, name: str, kind: str) -> None:
    body = {"init_images": [b64(SHADES)]} if "img2img" in path else {}
    settings = {"samples_format": name, "jpeg_quality": 70}
    status, content = studio.post(
        path, {**body, "prompt": "ein Kreis für 圆", "steps": 1, "override_settings": settings}
    )
    assert status == 200
    (text,) = content["images"]
    assert Image.open(io.BytesIO(base64.b64decode(text))).format == kind
    info = studio.post("/sdapi/v1/png-info", {"image": text})[1]["info"]
    assert [info] == json.loads(content["info"])["infotexts"] and info.startswith("ein Kreis für 圆\nSteps: 1")


def test_other_formats_are_refused(studio: Studio) -> None:
    why = studio.refused("/sdapi/v1/txt2img", override_settings={"samples_format": "avif"})
    assert why.startswith("override_settings.samples_format: ")
    assert studio.refused("/sdapi/v1/txt2img", override_settings={"webp_lossless": True}).startswith(
        "override_settings.webp_lossless: files in WebP have a quality"
    )
