"""A toy algorithm that reads a tensor of the checkpoint itself: it is added to every number, then they are doubled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from runtime.pipelines.doubling import Doubling
from runtime.tasks.scale import ScaleRequest

from runtime.bundle.tensors import read_tensor
from runtime.pipeline import Pipeline


class Shifting(Doubling):
    name: ClassVar[str] = "shifting"

    @classmethod
    def open(cls, root: Path, config: Mapping[str, Any]) -> Shifting:
        made = cls(config["times"])
        made.offset = read_tensor(root, "offset")
        return made

    def __call__(self, request: ScaleRequest) -> Pipeline:
        return self._run(self.offset + np.array(request.numbers, np.float32))
