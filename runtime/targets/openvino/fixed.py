"""Calls of fixed shapes: which submodels are compiled for each shape that they are called with, and for which first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import BATCH, Signature
from runtime.targets.openvino.devices import Where
from runtime.targets.openvino.settings import SHAPES_CHOICE
from runtime.targets.openvino.sharing import has_conditions

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each input, by name."""
LOOKS_UP: Final = {"Input", "Const", "Convert", "Gather", "Output"}
"""The layers of a model that only looks rows up."""


class Fixed(NamedTuple):
    """The fixed calls that a model is compiled for: shapes of inputs by name, and whether the rows are a
    classifier-free guidance batch.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    guided: bool = False

    @classmethod
    def of(cls, shapes: Shapes, guided: bool = False) -> Fixed:
        return cls(tuple(sorted(shapes.items())), guided)


def varies(submodel: Submodel) -> bool:
    return any(not isinstance(dim, int) for tensor in submodel.signature.inputs for dim in tensor.dims)


def needs_shape(submodel: Submodel, where: Where) -> bool:
    """Whether each shape is compiled by itself: on an NPU, and on the CPU where activations are quantized."""
    wrong = where.cpu and submodel.precision.activations != "float"
    return (wrong or where.npu) and not submodel.signature.states and varies(submodel)


def is_least(signature: Signature, shapes: Shapes) -> bool:
    """Whether a varying length other than the batch has its least value: such calls get a model of their own.

    At dynamic shapes, the CPU plugin of 2026.4 computes all later calls of other shapes wrongly (-2 dB) once the sample
    UNet had 2x2 latents, whose smallest feature map is one value, or one token of text.
    """
    return any(
        not isinstance(dim, int)
        and dim.name != BATCH.name
        and dim.min < dim.max
        and shapes[tensor.name][axis] == dim.min
        for tensor in signature.inputs
        for axis, dim in enumerate(tensor.dims)
    )


def looks_up(compiled: Any) -> bool:
    """Whether a model does nothing but look rows up in a table, as one that embeds tokens does: no shape of a call
    changes what another gives.
    """
    nodes = compiled.get_runtime_model().get_ops()
    return {node.get_rt_info()["layerType"].astype(str) for node in nodes} <= LOOKS_UP


def fixed_first(submodel: Submodel, where: Where, values: Mapping[str, str]) -> Fixed | None:
    """The calls that are compiled before any is made, with these choices: the usual ones where each shape is compiled
    by itself, None where a model takes any shape.
    """
    return usual(submodel) if needs_shape(submodel, where) or values.get(SHAPES_CHOICE) == "fixed" else None


def usual(submodel: Submodel) -> Fixed:
    """The most frequent call: a classifier-free guidance batch where there are conditions."""
    signature = submodel.signature
    lengths = {name: dim.opt for name, dim in signature.dims.items()}
    return Fixed.of({tensor.name: tensor.shape(lengths) for tensor in signature.inputs}, has_conditions(signature))
