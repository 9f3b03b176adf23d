"""What control networks are shown, made of photographs."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np

from runtime.vision.images import Picture

LOW: Final = 100
HIGH: Final = 200
"""Thresholds that the published networks were trained with."""


def canny(picture: Picture, low: int = LOW, high: int = HIGH) -> Picture:
    """White edges on black of uint8 RGB [height, width, 3] (Canny 1986), as OpenCV finds them: those whose gradient is
    above `high`, and what continues them above `low`, 0 to 1000.
    """
    return np.repeat(cv2.Canny(picture, low, high)[:, :, None], 3, axis=2).astype(np.uint8)
