"""LLaVA-NeXT's layout equals transformers': tiles, numbers of positions, and every position's embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from runtime.bundle.tensors import FILE
from runtime.errors import BundleError, InvalidInput
from runtime.language.layout import Size, layout_named
from runtime.language.layouts.anyres import Anyres
from runtime.vision.images import PictureFile, encode_image

HIDDEN, EDGE, PATCH = 6, 28, 7
PATCHES = (EDGE // PATCH) ** 2
GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84], [112, 28]]
PUBLISHED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008], [1344, 336], [336, 1344]]
SIZES = [(672, 672), (336, 1344), (1344, 336), (672, 336), (336, 672), (1, 1), (3, 5), (17, 31), (50, 50), (333, 1000),
    (1000, 333), (40, 300), (300, 40), (29, 30), (480, 640), (97, 113), (2, 60)]  # fmt: skip
"""Heights and widths: those of the published grids, tiny, tall, wide and odd ones."""


def write(folder: Path, edge: int, **settings: Any) -> Path:
    """A bundle's files."""
    newline = np.random.default_rng(1).standard_normal(HIDDEN).astype(np.float32)
    file = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": edge},
        "crop_size": {"height": edge, "width": edge}, "do_pad": True} | settings  # fmt: skip
    (folder / "preprocessor").mkdir(exist_ok=True)
    (folder / "preprocessor" / "preprocessor_config.json").write_text(json.dumps(file))
    (folder / FILE).parent.mkdir(exist_ok=True)
    save_file({"image_newline": newline}, folder / FILE)
    return folder


def library(edge: int, patch: int, grids: list[list[int]]) -> tuple[Any, Any]:
    """The library's model and processor; a tower and a decoder are there for their configs alone."""
    small: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1}  # fmt: skip
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**small, image_size=edge, patch_size=patch),
        text_config=LlamaConfig(**small, vocab_size=9),
        image_grid_pinpoints=grids,
        image_token_index=8,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}, image_grid_pinpoints=grids
    )
    processor: Any = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor, processor.patch_size = images, patch
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = 1, "default"
    processor.image_token = "i"
    return LlavaNextForConditionalGeneration(config).model, processor


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return library(EDGE, PATCH, GRIDS)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_and_positions_equal_transformers(tmp_path: Path, small: tuple[Any, Any], size: tuple[int, int]) -> None:
    model, processor = small
    layout = layout_named("anyres").open(write(tmp_path, EDGE), PATCHES, {"grids": GRIDS})
    shown = picture(*size)
    theirs = processor.image_processor(Image.fromarray(shown), return_tensors="np")
    tiles = layout.tiles(shown, "image")
    np.testing.assert_allclose(tiles, theirs["pixel_values"][0], atol=1e-5)
    np.testing.assert_array_equal(layout.tiles(PictureFile.open(encode_image(shown), "image"), "image"), tiles)

    features = np.random.default_rng(0).standard_normal((len(tiles), PATCHES, HIDDEN)).astype(np.float32)
    wanted, (count,) = model.pack_image_features(
        [torch.from_numpy(features)],
        torch.tensor([size]),
        "default",
        torch.from_numpy(layout.newline),  # type: ignore[attr-defined]
    )
    np.testing.assert_array_equal(layout.pack(features, Size(*size)), wanted[0].numpy())
    assert layout.positions(Size(*size)) == count == len(processor.replace_image_token(theirs, 0))


def test_the_published_grids_have_the_published_numbers_of_positions(tmp_path: Path) -> None:
    """Also of sizes that are drawn at random, whose roundings differ."""
    _, processor = library(336, 14, PUBLISHED)
    layout = Anyres.open(write(tmp_path, 336), 576, {"grids": PUBLISHED})
    assert layout.positions(Size(672, 672)) == 576 + 48 * 49
    drawn = np.random.default_rng(0).integers(20, 3000, (300, 2)).tolist()
    for height, width in [*SIZES, *drawn]:
        counted = processor._get_number_of_features(height, width, 336, 336) - 1
        assert layout.positions(Size(height, width)) == counted, (height, width)


@pytest.mark.parametrize("size", [(1, 500), (500, 1)])
def test_a_picture_that_no_grid_can_show_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    layout = Anyres.open(write(tmp_path, EDGE), PATCHES, {"grids": GRIDS})
    for act in (lambda: layout.check(Size(*size), "picture"), lambda: layout.tiles(picture(*size), "picture")):
        with pytest.raises(InvalidInput, match=rf"picture: is {size[1]}x{size[0]}.*less elongated"):
            act()


@pytest.mark.parametrize(
    ("patches", "options", "settings", "reason"),
    [
        (PATCHES, {}, {}, "layout_options"),
        (PATCHES, {"grids": GRIDS, "other": 1}, {}, "layout_options"),
        (PATCHES, {"grids": [[28, 50]]}, {}, "28x50 pixels, which tiles of 28"),
        (PATCHES + 1, {"grids": GRIDS}, {}, "17 features"),
        (PATCHES, {"grids": GRIDS}, {"crop_size": {"height": 28, "width": 14}}, "28x14 pixels"),
        (PATCHES, {"grids": GRIDS}, {"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor is not"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, patches: int, options: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BundleError, match=reason):
        Anyres.open(write(tmp_path, EDGE, **settings), patches, options)


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(BundleError, match=r"'anyress'.*anyres"):
        layout_named("anyress")
