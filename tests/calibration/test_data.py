"""What is calibrated on: seeded, never held out, sampled evenly, real calls only."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from calibration.data import PROMPTS, Sample, accepted, chat_requests, image_requests
from calibration.scenes import held_out
from runtime.engine import FakeEngine, Slot
from runtime.errors import InvalidInput
from runtime.pipeline import Call, Event, Pipeline, Progress, drive
from runtime.pipelines.diffusion import ImageRequest


def test_requests_are_seeded_and_mixed() -> None:
    requests, again, others = (list(islice(image_requests(seed), 8)) for seed in (0, 0, 1))
    assert [r.prompt for r in requests] == [r.prompt for r in again]
    assert [r.prompt for r in requests] != [r.prompt for r in others]
    assert len({r.seed for r in requests}) == 8
    assert {r.prompt for r in requests[1::2]} == set(PROMPTS[:4])


def test_no_case_that_models_are_scored_on_is_used() -> None:
    assert not any(held_out(request.prompt) for request in islice(image_requests(), 0, 40, 2))


def test_questions_show_a_picture() -> None:
    first, again = (list(islice(chat_requests(), 6)) for _ in range(2))
    assert all(request.images[0].shape == (128, 128, 3) for request in first)
    assert [request.messages[0].content[1] for request in first] == [request.messages[0].content[1] for request in again]
    assert all(np.array_equal(one.images[0], other.images[0]) for one, other in zip(first, again, strict=True))


def test_requests_that_a_model_cannot_read_are_passed_over() -> None:
    def pipeline(request: ImageRequest) -> Pipeline:
        if request.prompt in PROMPTS:
            raise InvalidInput("prompt", "is too long")
        return steps(1)

    def deaf(request: ImageRequest) -> Pipeline:
        raise InvalidInput("prompt", "is too long")

    assert len(list(accepted(pipeline, image_requests(), 5))) == 5
    with pytest.raises(InvalidInput, match="too long"):
        list(accepted(deaf, image_requests(), 5))


def steps(count: int) -> Pipeline:
    x = np.zeros(1, np.float32)
    for step in range(count):
        outputs = yield Call("denoiser", {"x": x, "step": np.array([step])})
        assert outputs is not None
        x += outputs["y"]  # in place, as pipelines may: what was kept must not change
        yield Progress(step + 1, count)


def run(sample: Sample, count: int) -> list[Event]:
    engine = FakeEngine(lambda inputs: {"y": np.ones(1, np.float32)})
    return list(drive(sample.watch(steps(count)), {"denoiser": engine}))


def test_sample_is_bounded_even_and_seeded() -> None:
    sample = Sample(["denoiser", "other"], limit=50)
    assert len(run(sample, 1000)) == 1000, "events are passed on"
    kept = [int(inputs["step"][0]) for inputs in sample.kept["denoiser"]]
    assert len(set(kept)) == 50
    assert 400 < np.mean(kept) < 600
    assert all(inputs["x"][0] == inputs["step"][0] for inputs in sample.kept["denoiser"])
    again = Sample(["denoiser", "other"], limit=50)
    run(again, 1000)
    assert [int(inputs["step"][0]) for inputs in again.kept["denoiser"]] == kept
    assert sample.kept["other"] == []


def test_few_calls_are_all_kept() -> None:
    sample = Sample(["denoiser"], limit=50)
    run(sample, 7)
    assert [int(inputs["step"][0]) for inputs in sample.kept["denoiser"]] == list(range(7))


def test_calls_with_states_or_of_others_are_left_out() -> None:
    sample = Sample(["decoder"])
    sample.offer(Call("decoder", {}, slot=Slot()))
    sample.offer(Call("unknown", {}))
    assert sample.kept == {"decoder": []}


def test_closing_reaches_the_pipeline() -> None:
    closed = []

    def pipeline() -> Pipeline:
        try:
            yield Progress(0, 1)
            yield Progress(1, 1)
        finally:
            closed.append(True)

    driven = drive(Sample([]).watch(pipeline()), {})
    next(driven)
    driven.close()
    assert closed == [True]
