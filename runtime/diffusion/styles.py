"""Pictures whose content or style is followed (IP-Adapter; Ye et al. 2023, arXiv 2308.06721): the denoiser's
cross-attention reads their features, beside the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from pydantic import model_validator

from runtime.bundle.manifest import Frozen
from runtime.diffusion.calls import Arrays, Part, run
from runtime.diffusion.guides import Style
from runtime.diffusion.named import check_names
from runtime.diffusion.schedule import Latents
from runtime.errors import InvalidInput
from runtime.vision.preprocessing import ImagePreprocessor

ENCODER: Final = "image_encoder"
PIXELS: Final = "pixel_values"
EMBEDS: Final = "image_embeds"
HIDDEN: Final = "hidden_states"
"""What the encoder gives: one vector for a picture, or the last layer's input at every position."""
SCALES: Final = "image_scales"


def embeds_name(index: int) -> str:
    """The denoiser's input with the features of adapter number `index`."""
    return f"{EMBEDS}_{index}"


class Features(Frozen):
    """What an adapter reads of a picture: an output of the encoder, float32 [positions, width]."""

    output: Literal["image_embeds", "hidden_states"]
    positions: int
    width: int


class Styles(Frozen):
    """The image adapters of a bundle by name, what each reads, and the edge of the pictures that their encoder takes,
    in pixels. Bundles of before have plain adapters alone, and state the `width` that they read.
    """

    names: tuple[str, ...]
    edge: int
    features: tuple[Features, ...]
    width: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, data: Any) -> Any:
        match data:
            case {"width": int(width), "names": [*names]} if not data.get("features"):
                return {**data, "features": [{"output": EMBEDS, "positions": 1, "width": width}] * len(names)}
        return data

    def check(self, styles: Sequence[Style]) -> None:
        """Raises InvalidInput naming `styles` for a name that the bundle does not have, or that is given twice."""
        names = [style.name for style in styles]
        check_names("styles", "image adapter", names, self.names, "give each adapter one picture")

    @property
    def preprocessor(self) -> ImagePreprocessor:
        """Resizes, crops and normalizes pictures as CLIP does."""
        size = {"size": {"shortest_edge": self.edge}, "crop_size": {"height": self.edge, "width": self.edge}}
        return ImagePreprocessor.model_validate({"image_processor_type": "CLIPImageProcessor", **size})


@dataclass(frozen=True)
class Styling:
    """The pictures of a request for the adapters of a bundle; without `settings` the model has none."""

    settings: Styles | None
    styles: tuple[Style, ...] = ()

    def encode(self, rows: int) -> Part[Arrays]:
        """The denoiser's inputs for batches of `rows`, of which the prompt's is the last: the features of each
        adapter's picture, float32 [rows, positions, width], and the scales, float32 [rows, adapters].

        Without a picture they are zeros. So is the negative prompt's vector of a picture; its hidden states are those
        of a picture of zeros, as in diffusers.
        """
        if self.settings is None:
            return {}
        chosen = {style.name: style for style in self.styles}
        found: Arrays = {}
        blank: Latents | None = None
        for index, (name, features) in enumerate(zip(self.settings.names, self.settings.features, strict=True)):
            embeds = np.zeros((rows, features.positions, features.width), np.float32)
            if name in chosen:
                pixels = self.settings.preprocessor([chosen[name].image], "styles")
                embeds[-1] = (yield from run(ENCODER, **{PIXELS: pixels}))[features.output][0]
                if rows > 1 and features.output == HIDDEN:
                    if blank is None:  # the same for all adapters
                        blank = (yield from run(ENCODER, **{PIXELS: np.zeros_like(pixels)}))[HIDDEN][0]
                    embeds[0] = blank
            found[embeds_name(index)] = embeds
        scales = [chosen[name].scale if name in chosen else 0.0 for name in self.settings.names]
        return {**found, SCALES: np.tile(np.array(scales, np.float32), (rows, 1))}


def styling(settings: Styles | None, styles: Sequence[Style]) -> Styling:
    """The pictures of a request. Raises InvalidInput naming `styles`."""
    if settings is None:
        if styles:
            raise InvalidInput("styles", "are for image adapters, and this bundle has none: build it with --ip-adapter")
        return Styling(None)
    settings.check(styles)
    return Styling(settings, tuple(styles))
