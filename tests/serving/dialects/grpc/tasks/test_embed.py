"""Requests for embeddings and their results as messages, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.errors import InvalidInput
from runtime.tasks.embed import Embeddings, EmbedRequest, Scores
from runtime.vision.images import PictureFile
from serving.dialects.grpc.messages import png
from serving.dialects.grpc.tasks.embed import EmbedStream, embed_events, embed_message, embed_request
from serving.enginecast_pb import embed_pb2

PICTURE = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)


@pytest.mark.parametrize("match", [None, "itc", "itm"])
def test_requests_come_back_as_they_were(match: Any) -> None:
    request = EmbedRequest(("a", ""), (PICTURE, PictureFile.open(png(PICTURE), "p")), match)
    again = embed_request(embed_pb2.EmbedRequest.FromString(embed_message("m", request).SerializeToString()))
    assert (again.texts, again.match) == (request.texts, match)
    for picture in again.images:
        assert isinstance(picture, PictureFile)
        np.testing.assert_array_equal(picture.decode(), PICTURE)


def test_results_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5), (3, 4, 5), (0, 5))]
    events = [Embeddings(vectors[0], vectors[1], 7), Embeddings(vectors[2], vectors[0]), Scores(vectors[0])]
    responses = [response for event in events if (response := EmbedStream().response(event))]
    for event, again in zip(events, embed_events(iter(responses)), strict=True):
        for name, array in vars(event).items():
            np.testing.assert_array_equal(getattr(again, name), array, strict=True)


def test_mistakes_name_the_field() -> None:
    with pytest.raises(InvalidInput, match="match: is unknown, expected MATCH_ITC"):
        embed_request(embed_pb2.EmbedRequest(texts=["a"], match=7))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"images\[1\]: is no PNG"):
        embed_request(embed_pb2.EmbedRequest(images=[png(PICTURE), b"no picture"]))
    with pytest.raises(InvalidInput, match="images: has 33 pictures"):
        embed_request(embed_pb2.EmbedRequest(images=[png(PICTURE)] * 33))
    with pytest.raises(InvalidInput, match="texts: is empty, and so is images"):
        embed_request(embed_pb2.EmbedRequest())
