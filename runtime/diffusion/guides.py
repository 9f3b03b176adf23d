"""Pictures that a request's control networks and image adapters follow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime import limits
from runtime.errors import InvalidInput
from runtime.vision.images import Picture, PictureFile, check_picture


@dataclass(frozen=True, eq=False)
class Control:
    """A picture that a control network of the bundle follows, by the network's name: what the network was trained on,
    such as white edges on black. It is a file, or uint8 RGB [height, width, 3], and is resized to what is drawn.

    `scale` is how much of it counts. It counts in the steps between `start` and `end`, shares of all steps, 0 to 1.
    """

    name: str
    image: Picture | PictureFile
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        limits.NAME.length("controls", self.name)
        limits.CONTROL_SCALE.number("controls", self.scale)
        for share in (self.start, self.end):
            limits.CONTROL_SHARE.number("controls", share)
        if self.start >= self.end:
            raise InvalidInput(
                "controls",
                f"'{self.name}' is from {self.start:g} to {self.end:g}, expected a start below the end",
            )
        if isinstance(self.image, np.ndarray):
            check_picture(self.image, "controls")


@dataclass(frozen=True, eq=False)
class Style:
    """A picture whose content or style an image adapter of the bundle follows, by the adapter's name: a file, or uint8
    RGB [height, width, 3]. `scale` is how much of it counts.
    """

    name: str
    image: Picture | PictureFile
    scale: float = 1.0

    def __post_init__(self) -> None:
        limits.NAME.length("styles", self.name)
        limits.STYLE_SCALE.number("styles", self.scale)
        if isinstance(self.image, np.ndarray):
            check_picture(self.image, "styles")
