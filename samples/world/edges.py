"""Pictures whose edges say where things lie, and how well the edges of one lie where those of another do."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

SHIFT: Final = 0.065
"""How far off its named place a thing may lie in both directions, as a share of the edge, where edges say where it
lies: models that know places alone draw things within a third of it.
"""
REACH: Final = 2
"""Pixels between edges that are taken for the same, of 128 along the picture."""


def agreement(drawn: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """How far edges, not 0 in uint8 [height, width], lie within `REACH` of each other: the harmonic mean of both
    shares, 1 where all do (the F score of Martin et al. 2004 for boundaries).
    """
    if not drawn.any() or not expected.any():
        return 0.0
    precision, recall = _covered(drawn, expected), _covered(expected, drawn)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _covered(edges: NDArray[np.uint8], by: NDArray[np.uint8]) -> float:
    """The share of edges near others."""
    width = 2 * REACH + 1
    near = cv2.dilate(by, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)))
    return float((near[edges > 0] > 0).mean())
