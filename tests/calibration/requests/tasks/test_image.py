"""General prompts: seeded, and of many kinds in each eight."""

from __future__ import annotations

from itertools import islice

import numpy as np

from calibration.requests.requests import REQUESTS
from calibration.requests.tasks.image import PROMPTS, TASK
from export.tasks.image import PROMPTS as COMPARED
from runtime.tasks.image import ImageRequest


def test_prompts_are_seeded_and_mixed() -> None:
    one, again, other = (list(islice(TASK.general(seed), REQUESTS)) for seed in (0, 0, 1))
    prompts = [[request.prompt for request in some] for some in (one, again, other)]
    assert prompts[0] == prompts[1] and not set(prompts[0]) & set(prompts[2])
    assert any(request.negative_prompt for request in one) and any(not request.negative_prompt for request in one)


def test_each_eight_hold_many_kinds() -> None:
    for start in range(0, len(PROMPTS), REQUESTS):
        some = [prompt for prompt, _ in PROMPTS[start : start + REQUESTS]]
        assert max(map(len, some)) > 4 * min(map(len, some)) or start, "short and long"
    assert len(dict(PROMPTS)) == len(PROMPTS) and sum(not prompt.isascii() for prompt, _ in PROMPTS) >= 1


def test_what_is_compared_was_not_calibrated_with() -> None:
    assert not {prompt for prompt, _ in PROMPTS} & set(COMPARED)


def test_every_other_request_has_pictures_for_networks_and_adapters() -> None:
    scheduler = {"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample": False}
    sizes = {"min": 8, "max": 64, "default": 32, "multiple": 8}
    vae = {"scaling_factor": 1.0, "scale_factor": 8, "latent_channels": 4}
    config = {"scheduler": scheduler, "sampler": "ddim", "vae": vae, "sizes": sizes}
    controls = {"names": ["edges", "depth"], "residuals": [[8, 1], [8, 1]]}
    request = ImageRequest("x", seed=2)
    assert TASK.fitted(config, request) is request
    fitted = TASK.fitted(config | {"controls": controls}, request)
    assert [control.name for control in fitted.controls] == ["edges", "depth"]
    picture = fitted.controls[0].image
    assert isinstance(picture, np.ndarray) and picture.shape == (32, 32, 3) and set(np.unique(picture)) == {0, 255}
    styles = {"names": ["style"], "edge": 16, "width": 4}
    (style,) = TASK.fitted(config | {"styles": styles}, request).styles
    assert style.name == "style" and isinstance(style.image, np.ndarray) and style.image.std() > 20
    odd = ImageRequest("x", seed=3)
    assert TASK.fitted(config | {"controls": controls}, odd) is odd
