"""A decoder whose caller says of how many positions it computes logits.

A canonical graph takes the last hidden state, [:, -1:], before its head, since a step needs no other logits and the
head is large. Here the start of that Slice becomes an input, so that one run also gives the logits of several last
positions, as verification of guessed tokens needs them. A step computes what it did before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from runtime.bundle.signature import Signature
from runtime.errors import EngineError
from runtime.optional import require

if TYPE_CHECKING:
    import onnx_ir as ir

START: Final = "logits_start"
"""int64 [1]: the first position that logits are computed of, counted from the end. -1 is the last one alone."""
POSITIONS: Final = 1
"""The axis of positions in hidden states and logits."""


def with_logits_start(model: ir.Model, signature: Signature) -> None:
    """Change a decoder in place, so that START is an input and logits are [batch, -START, vocabulary].

    Raises EngineError where its logits do not come from a Slice of the last position.
    """
    ir = require("onnx_ir", "export")
    logits = next(output for output in model.graph.outputs if output.name == signature.decoder.logits)
    node = _slice(logits)
    if node is None:
        raise EngineError(f"the decoder's {logits.name} are not those of its last position: build the bundle again")
    start = ir.Value(name=START, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    model.graph.inputs.append(start)
    node.replace_input_with(1, start)
    changed = [node.outputs[0]]
    for value in changed:
        if value.shape is not None:
            value.shape = ir.Shape([dim if axis != POSITIONS else "logits" for axis, dim in enumerate(value.shape)])
        changed += [output for reader, _ in value.uses() for output in reader.outputs]


def _slice(logits: ir.Value) -> ir.Node | None:
    """The node that takes the last position: the nearest one before the logits."""
    values = [logits]
    for value in values:
        node = value.producer()
        if node is not None and _takes_last(node):
            return node
        values += [found for found in node.inputs if found is not None] if node is not None else []
    return None


def _takes_last(node: ir.Node) -> bool:
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return False
    start, axes = (value.const_value if value is not None else None for value in (node.inputs[1], node.inputs[3]))
    return all(
        found is not None and np.array_equal(found.numpy(), [wanted])
        for found, wanted in ((start, -1), (axes, POSITIONS))
    )
