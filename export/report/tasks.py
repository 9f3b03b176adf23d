"""What the samples were trained for, as a task whose results a program can judge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from runtime.language.text import Message
from runtime.pipeline import drive
from runtime.placing.loading import LoadedModel
from runtime.tasks.chat import ChatRequest, TextDelta
from runtime.tasks.image import ImageReady, ImageRequest
from samples.world.questions import test_questions
from samples.world.scenes import test_prompts
from samples.world.scoring import score_answer, score_picture

TASKS: Final = {"shapes-diffusion": "prompts drawn right", "shapes-vlm": "questions answered right"}
"""Sources by name, and what they can be judged by."""


def right(model: LoadedModel, count: int, held: bool = True, seed: int = 0, first: int = 0) -> Iterator[bool]:
    """Whether the model does each of `count` cases right, from number `first` on: the first that `enginecast score`
    asks, or with `held` False some it never asks.
    """
    if model.task == "image":
        for number, scene in enumerate(test_prompts(count, seed, held)[first:], first):
            request = ImageRequest(scene.caption, seed=number)
            (ready,) = (
                event for event in drive(model.pipeline(request), model.engines) if isinstance(event, ImageReady)
            )
            yield bool(score_picture(ready.image.astype(np.uint8, copy=False), scene))
    else:
        for case in test_questions(count, seed, held)[first:]:
            asked = ChatRequest((Message("user", (case.picture, case.question)),), temperature=0.0)
            said = "".join(
                event.text for event in drive(model.pipeline(asked), model.engines) if isinstance(event, TextDelta)
            )
            yield score_answer(said, case.answer)
