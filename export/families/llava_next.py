"""LLaVA-NeXT, also known as LLaVA 1.6: LLaVA with pictures of any resolution (Liu et al. 2024,
https://llava-vl.github.io/blog/2024-01-30-llava-next/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil

from export.checkpoint.source import Source, read_json
from export.families.llava import VisionLanguage, patches
from export.family import Reference
from runtime.errors import SourceError, UnsupportedModel
from runtime.language.layouts.anyres import NEWLINE, Anyres


def see(model: Any) -> Reference:
    """The library encodes whole pictures, and packs their features as the device side does. So each tile is given as a
    picture of such tiles alone, nothing is packed, and the features of one of them are kept.
    """
    height, width = model.config.image_grid_pinpoints[0]
    edge = model.config.vision_config.image_size
    tiles = 1 + (height // edge) * (width // edge)

    def reference(pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pictures = pixel_values[:, None].expand(-1, tiles, -1, -1, -1)
        sizes = torch.tensor([[height, width]] * len(pixel_values))
        with _unpacked(model.model):
            found = model.get_image_features(pictures, sizes).pooler_output
        return (torch.stack([one[0] for one in found]),)

    return reference


@contextmanager
def _unpacked(model: Any) -> Iterator[None]:
    """While active, the model leaves the features of tiles as they are."""
    vars(model)["pack_image_features"] = lambda features, *_, **__: (features, None)
    try:
        yield
    finally:
        del vars(model)["pack_image_features"]  # the method of its class is there again


def layout(source: Source, config: Any) -> Mapping[str, Any]:
    """Raises SourceError or UnsupportedModel where the library itself could not put features together."""
    file, vision = source.root / "config.json", config.vision_config
    if patches(config) != (vision.image_size // vision.patch_size) ** 2:
        raise UnsupportedModel(
            f"{file}: vision_feature_select_strategy is {config.vision_feature_select_strategy}, with which the tower "
            f"gives {patches(config)} features of a tile and not a square of them: take a checkpoint whose class token "
            "is left out"
        )
    grids = [list(grid) for grid in config.image_grid_pinpoints]
    if any(length % vision.image_size or length < 1 for grid in grids for length in grid):
        raise SourceError(
            f"{file}: image_grid_pinpoints are {grids}, expected multiples of vision_config.image_size "
            f"({vision.image_size}). Correct it"
        )
    if (found := _processor_grids(source)) != grids:
        raise SourceError(
            f"{file} has the image_grid_pinpoints {grids}, the image processor's file {found}: take both from the same "
            "checkpoint"
        )
    return {"layout": Anyres.name, "layout_options": {"grids": grids}}


def _processor_grids(source: Source) -> list[list[int]]:
    """Those that the image processor's file has, or else its class."""
    nested, own = (source.root / name for name in ("processor_config.json", "preprocessor_config.json"))
    found = (read_json(nested).get("image_processor") if nested.is_file() else None) or (
        read_json(own) if own.is_file() else {}
    )
    grids = found.get("image_grid_pinpoints") or LlavaNextImageProcessorPil.image_grid_pinpoints
    return [list(grid) for grid in grids]


FAMILY = VisionLanguage(
    "llava_next",
    LlavaNextForConditionalGeneration,
    LlavaNextConfig,
    see,
    layout,
    {NEWLINE: "model.image_newline"},
).family
