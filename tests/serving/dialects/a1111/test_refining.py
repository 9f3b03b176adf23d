"""A second model that goes on where the first one ends, on a fake server with three models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest

from runtime.vision.images import Picture
from tests.fakes.proofs import proves
from tests.fakes.serving import FakeAnswers, FakeModel, FakeServer, until
from tests.serving.dialects.a1111.conftest import DRAW, Studio, opened
from tests.serving.dialects.a1111.test_watching import Call, pixels

PATH = "/sdapi/v1/txt2img"
SETTINGS = {"sd_model_checkpoint": "draw [0123456789]"}


class Fine(FakeModel):
    picture: Picture = np.full((8, 16, 3), 50, np.uint8)


class Three(FakeServer):
    kinds: ClassVar[Mapping[str, type[FakeModel]]] = MappingProxyType(
        {"draw": FakeModel, "fine": Fine, "talk": FakeAnswers}
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with opened(Three(tmp_path_factory.mktemp("fake") / "bundles", ready=True)) as found:
        yield found


@proves("POST /sdapi/v1/txt2img", "refiner_checkpoint", "refiner_switch_at")
def test_a_refiner_goes_on(three: Studio) -> None:
    three.requests.clear()
    fields = {"prompt": "a <lora:soft:0.5>", "steps": 4, "seed": 7, "batch_size": 2, "subseed": 3}
    refining = {"refiner_checkpoint": "fine", "refiner_switch_at": 0.75, "override_settings": SETTINGS}
    status, content = three.post(PATH, {**fields, **refining, "force_task_id": "refined"})
    assert status == 200 and len(content["images"]) == 2
    begun, *gone_on = three.requests
    assert (begun.denoising_end, begun.images, begun.loras) == (0.75, 2, {"soft": 0.5})
    assert [(one.denoising_start, one.denoising_end, one.images, one.seed) for one in gone_on] == [
        (0.75, None, 1, 7), (0.75, None, 1, 8),
    ]  # fmt: skip
    assert all(one.latents.shape == (1, 4, 1, 2) and one.loras == {} and one.prompt == "a" for one in gone_on)
    assert content["info"].count("Refiner: fine, Refiner switch at: 0.75") == 2
    assert '"all_seeds": [7, 8]' in content["info"]
    assert all((pixels(one) == 50).all() for one in content["images"]), "the refiner's pictures"


@pytest.mark.parametrize(
    "fields",
    [
        {"refiner_checkpoint": "None"},
        {"refiner_checkpoint": "draw"},
        {"refiner_switch_at": 0.5},
        {"refiner_checkpoint": "fine", "refiner_switch_at": 1},
    ],
)
def test_without_a_refiner(three: Studio, fields: dict[str, Any]) -> None:
    three.requests.clear()
    assert three.post(PATH, {"steps": 1, "refiner_switch_at": 0.8, "override_settings": SETTINGS, **fields})[0] == 200
    assert [one.denoising_end for one in three.requests] == [None]


@pytest.mark.parametrize(
    ("path", "fields", "why"),
    [
        (PATH, {"refiner_checkpoint": "other", "refiner_switch_at": 0.8}, "refiner_checkpoint: 'other' is not known"),
        (PATH, {"refiner_checkpoint": "fine"}, "refiner_switch_at: is None, expected a number between 0 and 1"),
        (PATH, {"refiner_checkpoint": "fine", "refiner_switch_at": 0}, "refiner_switch_at: is 0"),
        (
            PATH,
            {"refiner_checkpoint": "fine", "refiner_switch_at": 0.5, "enable_hr": True},
            "enable_hr: is of pictures",
        ),
        (
            DRAW[1],
            {"refiner_checkpoint": "fine", "refiner_switch_at": 0.5},
            "refiner_checkpoint: one model draws on a picture",
        ),
    ],
)
def test_what_a_refiner_cannot_do(three: Studio, path: str, fields: dict[str, Any], why: str) -> None:
    assert three.refused(path, override_settings=SETTINGS, **fields).startswith(why)


def test_progress_counts_both_models(three: Studio) -> None:
    fake = three.fake
    fake.models["fine"].hold()
    body = {"steps": 4, "refiner_checkpoint": "fine", "refiner_switch_at": 0.5, "force_task_id": "two"}
    call = Call(three.post, PATH, {**body, "override_settings": SETTINGS})
    before = fake.models["fine"].calls
    until(lambda: fake.models["fine"].calls == before + 1)
    fake.models["fine"].let(1)

    def progress() -> Any:
        return three.post("/internal/progress", {"id_task": "two"})[1]["progress"]

    until(lambda: progress() == 5 / 8)
    fake.models["fine"].release()
    assert call.end()[0] == 200
