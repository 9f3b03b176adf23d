"""Fakes to test programs with that use enginecast: no model, no bundle and no compiled engine is needed.

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
    """What `enginecast.load` returns, over a fake: it draws grey pictures, or with `FakeAnswers()` answers "a red
    círcle".
    """
    return Model(fake or FakeModel())
