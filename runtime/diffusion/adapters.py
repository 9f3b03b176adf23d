"""LoRA files of a bundle, chosen by each request (Hu et al. 2021, arXiv:2106.09685).

The layers of a submodel have low-rank branches whose matrices are two of its inputs, float32: `lora_down` [rank, inputs
of all layers] and `lora_up` [rank, outputs of all layers]. `adapters/<name>.safetensors` holds the rows of one LoRA for
each submodel, as `<submodel>.lora_down` and so on, with alpha / rank in the second. Each has rows of its own, which are
zeros where a request does not name it: pictures do not depend on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.tensors import open_tensors
from runtime.errors import BundleError, InvalidInput, did_you_mean
from runtime.pipeline import Call, Outputs, Pipeline

FOLDER: Final = "adapters"
DOWN, UP = "lora_down", "lora_up"

Floats = NDArray[np.float32]
Loras = Mapping[str, float]
"""The scales of LoRA files by name."""


@dataclass(frozen=True)
class Adapter:
    """The rows of a LoRA: the first of its rows, and both matrices by submodel."""

    name: str
    first: int
    matrices: Mapping[str, Mapping[str, Floats]]

    @property
    def rank(self) -> int:
        return len(next(iter(next(iter(self.matrices.values())).values())))


@dataclass(frozen=True)
class Adapters:
    """The LoRA files of a bundle, by name."""

    several: Mapping[str, Adapter] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path) -> Adapters:
        """Those in a bundle's folder. Raises BundleError where one cannot be read."""
        found, first = {}, 0
        for name in names(root):
            adapter = Adapter(name, first, _matrices(root / FOLDER / f"{name}.safetensors"))
            found[name] = adapter
            first += adapter.rank
        return cls(found)

    def inputs(self, loras: Loras) -> dict[str, dict[str, Floats]]:
        """The inputs of each submodel with branches, for these scales. Raises InvalidInput naming `loras` where there
        is no such LoRA.
        """
        for name in loras:
            if name not in self.several:
                known = did_you_mean(name, self.several) if self.several else "this bundle was built without --adapter"
                raise InvalidInput("loras", f"there is no LoRA '{name}': {known}")
        adapters = list(self.several.values())
        submodels = dict.fromkeys(name for adapter in adapters for name in adapter.matrices)
        return {submodel: _stacked(adapters, submodel, loras) for submodel in submodels}


def names(root: Path) -> tuple[str, ...]:
    """The names of the LoRA files in a bundle's folder, sorted."""
    return tuple(path.stem for path in sorted((root / FOLDER).glob("*.safetensors")))


def adapted(pipeline: Pipeline, inputs: Mapping[str, Mapping[str, Floats]]) -> Pipeline:
    """A pipeline whose calls get these inputs of their submodels besides their own."""
    outputs: Outputs | None = None
    with closing(pipeline), suppress(StopIteration):
        while True:
            item = pipeline.send(outputs)
            if isinstance(item, Call):
                item = replace(item, inputs={**item.inputs, **inputs.get(item.submodel, {})})
            outputs = yield item


def _stacked(adapters: Sequence[Adapter], submodel: str, loras: Loras) -> dict[str, Floats]:
    """Both inputs of a submodel: the rows of every adapter, those that are not used zeros."""
    rank = sum(adapter.rank for adapter in adapters)
    shapes = next(adapter.matrices[submodel] for adapter in adapters if submodel in adapter.matrices)
    found = {name: np.zeros((rank, shapes[name].shape[1]), np.float32) for name in (DOWN, UP)}
    for adapter in adapters:
        if adapter.name in loras and submodel in adapter.matrices:
            rows, own = slice(adapter.first, adapter.first + adapter.rank), adapter.matrices[submodel]
            found[DOWN][rows], found[UP][rows] = own[DOWN], np.float32(loras[adapter.name]) * own[UP]
    return found


def _matrices(path: Path) -> dict[str, dict[str, Floats]]:
    found: dict[str, dict[str, Floats]] = {}
    try:
        for name, stored in open_tensors(path).items():
            submodel, _, which = name.rpartition(".")
            if stored.dtype != "F32" or len(stored.shape) != 2 or which not in (DOWN, UP):
                raise ValueError(f"its tensor {name} is none of an adapter")
            found.setdefault(submodel, {})[which] = np.frombuffer(stored.data, "<f4").reshape(stored.shape)
        if not found or any(set(both) != {DOWN, UP} for both in found.values()):
            raise ValueError("it lacks a matrix")
        if len({len(matrix) for both in found.values() for matrix in both.values()}) > 1:
            raise ValueError("its matrices differ in rank")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}. Build the bundle again") from None
    return found
