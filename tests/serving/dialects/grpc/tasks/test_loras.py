"""The LoRA files of a request: over gRPC, from Python and from the command line."""

from __future__ import annotations

import pytest

from runtime.errors import InvalidInput
from runtime.tasks.image import ImageRequest
from serving.cli.drawing import scales
from serving.dialects.grpc.tasks.image import image_message, image_request
from serving.dialects.python import requests


def test_names_and_scales_arrive() -> None:
    request = requests.image_request("a fox", {"loras": {"snow": -0.5, "fox": 1}})
    assert image_request(image_message("m", request)).loras == {"snow": -0.5, "fox": 1.0}
    assert image_request(image_message("m", ImageRequest("a fox"))).loras == {}


def test_options_of_the_command() -> None:
    assert scales(["snow:-0.5", "fox"]) == {"snow": -0.5, "fox": 1.0}
    with pytest.raises(InvalidInput, match=r"lora: is 'fox:much', expected NAME or NAME:SCALE such as fox:0\.8"):
        scales(["fox:much"])
    with pytest.raises(InvalidInput, match="lora: names 'fox' twice"):
        scales(["fox", "fox:2"])


@pytest.mark.parametrize("scale", [float("nan"), 101.0, -101.0])
def test_scales_beyond_the_limit_are_refused(scale: float) -> None:
    with pytest.raises(InvalidInput, match=r"loras: is .*, expected -100 to 100"):
        ImageRequest("a fox", loras={"snow": scale})


def test_more_than_a_bundle_can_have_is_refused() -> None:
    with pytest.raises(InvalidInput, match="loras: has 65 LoRA files, expected at most 64"):
        ImageRequest("a fox", loras={str(number): 1.0 for number in range(65)})
