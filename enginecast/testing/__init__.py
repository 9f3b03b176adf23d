"""Fakes for testing programs that use enginecast. They need no model, bundle or compiled engine.

from enginecast.testing import FakeServer

def test_my_program(tmp_path):
    with FakeServer(tmp_path) as server:
        drawing = enginecast.Client(server.address, "draw").generate("a circle", steps=2)
        assert drawing.image.shape == (8, 16, 3)
"""

from __future__ import annotations

from enginecast.testing.server import FakeAnswers, FakeModel, FakeServer
from runtime.engine import FakeEngine
from serving.dialects.python.model import Model

__all__ = ["FakeAnswers", "FakeEngine", "FakeModel", "FakeServer", "fake_model"]


def fake_model(fake: FakeModel | None = None) -> Model:
    """A `Model` as from `enginecast.load`, with a fake behind it. It draws grey pictures; with `FakeAnswers()` it
    answers "a red círcle".
    """
    return Model(fake or FakeModel())
