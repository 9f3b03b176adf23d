"""A model that takes requests before its engines are there."""

from __future__ import annotations

import threading
from typing import Any

from runtime.bundle.manifest import Submodel
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Signature
from runtime.engine import FakeEngine
from runtime.pipeline import Call, Pipeline, Progress
from runtime.placing.arriving import Arriving
from runtime.tasks.image import ImageReady
from tests.fakes.serving import FakeModel

NAMES = ("text_encoder", "denoiser", "decoder")


class Engine(FakeEngine):
    closed = False

    def close(self) -> None:
        self.closed = True


def engine(name: str) -> Engine:
    made = Engine(lambda inputs: {})
    made.submodel = Submodel(
        name=name,
        signature=Signature(inputs=(), outputs=()),
        graph=f"onnx/{name}/model.onnx",
        precision=Precision.parse("none"),
        nbytes=0,
    )
    return made


class Slow(FakeModel):
    """A model each of whose engines is loaded once its gate is open."""

    device = ""

    def __init__(self) -> None:
        super().__init__()
        self.came = Arriving(NAMES)
        self.gates = {name: threading.Event() for name in NAMES}
        self.made: dict[str, Engine] = {}
        self.wrong: Exception | None = None
        self.needed: tuple[str, ...] = NAMES
        self.engines, self.rest = self.came, self._load  # type: ignore[assignment]

    def open(self, *names: str) -> None:
        for name in names or NAMES:
            self.gates[name].set()

    def _load(self) -> FakeModel:
        try:
            while (name := self.came.following()) is not None:
                assert self.gates[name].wait(10)
                if self.wrong is not None:
                    raise self.wrong
                self.made[name] = engine(name)
                self.came.put(name, self.made[name])
        except Exception as error:
            self.came.fail(error)
            raise
        self.device, self.notes = "none", ("all is there",)
        return self

    def _draw(self, steps: int, request: Any) -> Pipeline:
        for number, name in enumerate(self.needed, 1):
            yield Call(name, {})
            yield Progress(number, len(self.needed))
        yield ImageReady(self.picture, 0, 0)

    def close(self) -> None:
        self.came.close()
        for made in self.came.here.values():
            made.close()
        super().close()

    def done(self, name: str) -> int:
        """Calls of a submodel so far."""
        return len(self.made[name].calls) if name in self.made else 0
