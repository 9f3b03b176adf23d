"""Requests for pictures as messages, and back."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import InvalidInput
from runtime.tasks.image import Control, ImageRequest
from runtime.vision.images import PictureFile, decoded
from serving.dialects.grpc.tasks.image import image_message, image_request
from serving.enginecast_pb import image_pb2

PICTURE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


def test_controls_are_sent_as_files() -> None:
    request = ImageRequest("x", controls=(Control("edges", PICTURE, 0.5, 0.25, 0.75), Control("depth", PICTURE)))
    got = image_request(image_message("model", request))
    assert [(c.name, c.scale, c.start, c.end) for c in got.controls] == [("edges", 0.5, 0.25, 0.75), ("depth", 1, 0, 1)]
    assert all((decoded(control.image) == PICTURE).all() for control in got.controls)
    assert got.nbytes == sum(len(c.image.data) for c in got.controls if isinstance(c.image, PictureFile)) > 0


def test_a_control_that_leaves_numbers_open_counts_fully() -> None:
    sent = image_message("model", ImageRequest("x", controls=(Control("edges", PICTURE),)))
    bare = image_pb2.Control(name="edges", image=sent.controls[0].image)
    (control,) = image_request(image_pb2.GenerateRequest(prompt="x", controls=[bare])).controls
    assert (control.scale, control.start, control.end) == (1, 0, 1)


def test_a_control_without_a_picture() -> None:
    message = image_pb2.GenerateRequest(prompt="x", controls=[image_pb2.Control(name="edges")])
    with pytest.raises(InvalidInput, match="controls: "):
        image_request(message)
