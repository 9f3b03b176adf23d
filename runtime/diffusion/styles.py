"""Pictures whose content or style is followed (IP-Adapter; Ye et al. 2023, arXiv 2308.06721): the denoiser's
cross-attention reads their features, beside the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from runtime.bundle.manifest import Frozen
from runtime.diffusion.calls import Arrays, Part, run
from runtime.diffusion.named import check_names
from runtime.errors import InvalidInput
from runtime.tasks.image import Style
from runtime.vision.preprocessing import ImagePreprocessor

ENCODER: Final = "image_encoder"
PIXELS: Final = "pixel_values"
EMBEDS: Final = "image_embeds"
SCALES: Final = "image_scales"


def embeds_name(index: int) -> str:
    """The denoiser's input with the features of adapter number `index`."""
    return f"{EMBEDS}_{index}"


class Styles(Frozen):
    """The image adapters of a bundle by name; the edge of the pictures that their encoder takes, in pixels, and the
    width of the features that it gives.
    """

    names: tuple[str, ...]
    edge: int
    width: int

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
        adapter's picture, float32 [rows, 1, width], zeros for the negative prompt and without a picture, and the
        scales, float32 [rows, adapters].
        """
        if self.settings is None:
            return {}
        chosen = {style.name: style for style in self.styles}
        found: Arrays = {}
        for index, name in enumerate(self.settings.names):
            embeds = np.zeros((rows, 1, self.settings.width), np.float32)
            if name in chosen:
                pixels = self.settings.preprocessor([chosen[name].image], "styles")
                outputs = yield from run(ENCODER, **{PIXELS: pixels})
                embeds[-1, 0] = outputs[EMBEDS][0]
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
