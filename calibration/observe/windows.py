"""What convolutions multiply their kernels by, as rows: each window of the input flattened, so that a convolution is a
matrix product.

A kernel seen as a matrix [K, N] has its rows in the order of the stored kernel: input channels, then the window. Layers
of more than MOST_ROWS inputs are cut into parts of whole channels, which are looked at one by one: second moments of
all would not fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from calibration.quantize.layers import Layer, add_initializer, name_of

MOST_ROWS: Final = 6144
"""Inputs of a layer whose second moments are taken together."""
POSITIONS: Final = 1024
"""Windows of one picture that are looked at, about: of more, every third, fifth or so in each direction."""
END: Final = 2**62


def parts(rows: int, unit: int, block: int) -> list[slice]:
    """The inputs 0..rows of a layer in parts of at most MOST_ROWS, each a whole number of units and of blocks, as equal
    as that allows.
    """
    step = int(np.lcm(unit, block))
    count = -(-rows // max(MOST_ROWS, step))
    size = -(-rows // count // step) * step
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def add_windows(model: ir.Model, layer: Layer, block: int) -> list[tuple[str, slice]]:
    """Add nodes that give the rows of a convolution's input, [batch, windows, K] in parts; the names of these, and the
    rows of K each has.

    They follow what makes the input. Convolutions in groups have no such form.
    """
    source = layer.node.inputs[0]
    assert source is not None and layer.node.attributes.get_int("group", 1) == 1
    window = layer.stored[2:]
    found = [(f"{name_of(layer.node)}.windows.{cut.start}", cut) for cut in parts(layer.matrix[0], prod(window), block)]
    made = _Nodes(model, f"{name_of(layer.node)}.windows")
    step, padded = _step(made, source, layer.node), _padded(made, source, layer.node)
    for name, cut in found:
        channels = slice(cut.start // prod(window), cut.stop // prod(window))
        _rows(made, padded, layer, channels, step, name, cut.stop - cut.start)
    producer = source.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], made.nodes)
    else:
        model.graph.insert_after(producer, made.nodes)
    return found


class _Nodes:
    """Nodes to be, and constants of the graph for them."""

    def __init__(self, model: ir.Model, stem: str) -> None:
        self._model, self._stem, self.nodes = model, stem, list[ir.Node]()

    def constant(self, values: Sequence[int]) -> ir.Value:
        name = f"windows.{'_'.join(map(str, values))}"
        known = self._model.graph.initializers.get(name)
        return known or add_initializer(self._model, name, ir.tensor(np.array(values, np.int64), name=name))

    def add(
        self, op: str, inputs: Sequence[ir.Value], rank: int, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: Any
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{self._stem}/{len(self.nodes)}")
        self.nodes.append(node)
        value = node.outputs[0]
        value.name, value.dtype, value.shape = f"{node.name}:0", dtype, ir.Shape([None] * rank)
        return value


def _padded(made: _Nodes, source: ir.Value, node: ir.Node) -> ir.Value:
    pads = list(node.attributes.get_ints("pads", ()))
    axes = len(pads) // 2
    if not any(pads):
        return source
    return made.add("Pad", [source, made.constant([0, 0, *pads[:axes], 0, 0, *pads[axes:]])], axes + 2)


def _step(made: _Nodes, source: ir.Value, node: ir.Node) -> ir.Value:
    """The distance between windows that are looked at, in each direction: an odd multiple of the stride, so that all
    alignments occur.
    """
    assert source.shape is not None
    axes, whole, single = len(source.shape) - 2, ir.DataType.INT64, ir.DataType.FLOAT
    strides = list(node.attributes.get_ints("strides", [1] * axes))
    shape = made.add("Shape", [source], 1, whole, start=2)
    size = made.add("Cast", [made.add("ReduceProd", [shape], 1, whole, keepdims=1)], 1, to=single)
    limit = made.add("Cast", [made.constant([POSITIONS * prod(strides)])], 1, to=single)
    share = made.add("Div", [size, limit], 1)
    root = made.add("Cast", [made.add("Sqrt", [share], 1) if axes == 2 else share], 1, whole, to=whole)
    half = made.add("Div", [root, made.constant([2])], 1, whole)
    odd = made.add("Add", [made.add("Mul", [half, made.constant([2])], 1, whole), made.constant([1])], 1, whole)
    return made.add("Mul", [odd, made.constant(strides)], 1, whole)


def _rows(made: _Nodes, padded: ir.Value, layer: Layer, channels: slice, step: ir.Value, name: str, width: int) -> None:
    """One part: a slice for each place in the window, stacked."""
    window, axes = layer.stored[2:], len(layer.stored) - 2
    dilations = list(layer.node.attributes.get_ints("dilations", [1] * axes))
    spatial = made.constant(range(2, 2 + axes))
    some = made.add("Slice", [padded, *(made.constant([one]) for one in (channels.start, channels.stop, 1))], axes + 2)
    taps = []
    for place in np.ndindex(*window):
        starts = [at * dilation for at, dilation in zip(place, dilations, strict=True)]
        ends = [
            (at - (length - 1)) * dilation or END for at, length, dilation in zip(place, window, dilations, strict=True)
        ]
        tap = made.add("Slice", [some, made.constant(starts), made.constant(ends), spatial, step], axes + 2)
        taps.append(made.add("Unsqueeze", [tap, made.constant([2])], axes + 3))
    stacked = made.add("Concat", taps, axes + 3, axis=2) if len(taps) > 1 else taps[0]
    moved = made.add("Transpose", [stacked], axes + 3, perm=[0, *range(3, 3 + axes), 1, 2])
    rows = made.add("Reshape", [moved, made.constant([0, -1, width])], 3)
    rows.name, rows.shape = name, ir.Shape([None, None, width])
