"""Engine calls of diffusion pipelines, and the parts of a pipeline that make them."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.signature import Array
from runtime.errors import EngineError
from runtime.pipeline import Call, Event, Outputs

T = TypeVar("T")
Part = Generator[Call | Event, Outputs | None, T]
"""A part of a pipeline that results in a T."""
Arrays = dict[str, NDArray[np.float32]]


def run(submodel: str, **inputs: Array) -> Part[Arrays]:
    """The outputs of a submodel, as float32. Raises EngineError if one is not finite: a black picture would hide
    that.
    """
    outputs = yield Call(submodel, inputs)
    assert outputs is not None, "a driver answers a call with its outputs"
    arrays = {name: np.asarray(array, np.float32) for name, array in outputs.items()}
    for name, array in arrays.items():
        if not math.isfinite(float(array.sum(dtype=np.float64))):
            raise EngineError(
                f"{submodel} gave NaN or infinite values in '{name}', expected finite ones: try another target or "
                "--quant none"
            )
    return arrays
