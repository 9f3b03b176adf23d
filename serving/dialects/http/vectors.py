"""Vectors of texts and pictures as other programs have them: one each, of length 1, perhaps shortened."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InvalidInput
from runtime.tasks.embed import Embeddings


def unit_vectors(found: Embeddings, dimensions: int | None = None) -> NDArray[np.float32]:
    """The vectors of the texts, then those of the pictures, float32 [count, width], each of length 1. Of vectors that
    are longer than `dimensions`, these are the first, and then of length 1 again. Raises InvalidInput for a model with
    several vectors of a picture.
    """
    if len(found.images) and found.images.ndim != 2:
        raise InvalidInput("images", "have several vectors each in this model: send them over gRPC, or embed texts")
    vectors = np.concatenate([part for part in (found.texts, found.images) if len(part)])[:, :dimensions]
    shortest = np.finfo(np.float32).tiny
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), shortest), np.float32)
