"""A toy algorithm: every number runs through the submodel "doubler" as often as the bundle's settings say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from runtime.tasks.scale import Scaled, ScaleRequest

from runtime.pipeline import Call, Example, ModelPipeline, Pipeline


class Doubling(ModelPipeline):
    name: ClassVar[str] = "doubling"
    task: ClassVar[str] = ScaleRequest.task

    def __init__(self, times: int) -> None:
        self.times = times

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> Doubling:
        return cls(config["times"])

    @property
    def origins(self) -> Mapping[str, str]:
        return {"x": "the request"}

    def examples(self) -> Iterator[Example]:
        yield Example("one number", ScaleRequest((1.0,)))

    def __call__(self, request: ScaleRequest) -> Pipeline:
        return self._run(np.array(request.numbers, np.float32))

    def _run(self, numbers: Any) -> Pipeline:
        for _ in range(self.times):
            outputs = yield Call("doubler", {"x": numbers})
            assert outputs is not None
            numbers = outputs["y"]
        yield Scaled(tuple(map(float, numbers)))
