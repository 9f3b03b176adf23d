"""In this process, a request runs while later submodels of its model are loaded."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from runtime.engine import Options
from runtime.errors import EngineError, Unavailable
from runtime.pipeline import Progress
from runtime.placing.placement import PlacementOptions
from runtime.tasks.image import ImageReady, ImageRequest
from serving.dialects.python.model import Model, open_for
from tests.fakes.beginning import Slow


def test_the_first_step_is_there_before_the_last_submodel() -> None:
    model = Slow()
    model.open("text_encoder")
    with Model(model) as opened:
        events = iter(opened.generate_stream("a circle"))
        while not isinstance(event := next(events), Progress):
            pass
        assert event.step == 1 and model.came.coming == ("denoiser", "decoder") and opened.task == "image"
        model.open()
        assert any(isinstance(event, ImageReady) for event in events)
        assert (opened.device, opened.notes) == ("none", ("all is there",))
    assert model.closed and all(engine.closed for engine in model.made.values())


def test_a_request_gets_the_error_of_a_submodel(caplog: pytest.LogCaptureFixture) -> None:
    model = Slow()
    model.wrong = EngineError("the compiler failed")
    model.open()
    with Model(model) as opened, pytest.raises(EngineError, match="the compiler failed"):
        opened.generate("a circle")
    with pytest.raises(EngineError, match="the compiler failed"):
        _ = opened.target
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "a part of the model could not be loaded: the compiler failed"
    ]


def test_closing_waits_for_what_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model = Slow()
    model.open("text_encoder")
    opened = Model(model)
    threading.Timer(0.05, model.open).start()
    opened.close()
    assert model.closed and not model.came.here.keys() - {"text_encoder"}
    assert all(engine.closed for engine in model.made.values()) and not caplog.records
    with pytest.raises(Unavailable, match="was closed"):
        opened.generate("a circle")


def test_a_real_request_is_opened_before_its_engines_are_there(diffusion_bundle: Path) -> None:
    request = ImageRequest("a red circle", steps=1, seed=1, width=64, height=64)
    with open_for(diffusion_bundle, request, "onnxruntime", Options(threads=1), PlacementOptions()) as model:
        drawing = model.draw(request).result()
        assert drawing.image.shape == (64, 64, 3) and model.target == "onnxruntime"
