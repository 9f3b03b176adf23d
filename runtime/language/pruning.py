"""Pictures with fewer positions: the features that tell most of a picture, chosen by themselves, without the question
and without training.

Most of a picture's features are like another one. A greedy choice takes, again and again, the one that is least like
its nearest among those that were taken, by the cosine: DivPrune (Alvar et al. 2025, arXiv:2503.02175). What is chosen
keeps the number of its place in the prompt, so that the decoder knows where in the picture it was: see
docs/decisions/0045-pictures-pruned-in-place.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.signature import Array

TIE = 1e-6  # cosines that differ by less are equal: processors round differently, and would choose differently


def diverse(features: Array, count: int) -> NDArray[np.int64]:
    """The indices, in order, of `count` features [positions, hidden]; of all where there are no more.

    The first one taken is the least like all; of features that are as good the one that comes first is taken. Equal
    features give equal indices on every processor. Needs positions² * 4 bytes.
    """
    positions = len(features)
    if count >= positions:
        return np.arange(positions)
    given = np.asarray(features, np.float32)
    lengths = np.linalg.norm(given, axis=1, keepdims=True)
    units = given / np.maximum(lengths, np.finfo(np.float32).tiny)
    likeness = units @ units.T
    nearest, chosen = likeness.mean(axis=1), np.zeros(positions, np.bool_)
    for taken in range(count):
        best = int((nearest <= nearest.min() + TIE).argmax())
        nearest = np.maximum(nearest, likeness[best]) if taken else likeness[best].copy()
        chosen[best] = True
        nearest[chosen] = np.inf
    return np.flatnonzero(chosen)
