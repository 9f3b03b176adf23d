"""Which positions a decoder's attention sees. Targets whose kernels build the mask themselves assume this; it is
checked against the graph.

A position sees itself and those before it that the attention mask allows, in layers with a window only the latest
`window` of them, itself included. Any other pattern needs a mask that the graph computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from runtime.bundle.signature import Array, Signature
from runtime.errors import EngineError
from runtime.optional import require
from runtime.targets.lowering.values import operand, optional, uncast

if TYPE_CHECKING:
    import onnx_ir as ir


def attentions(model: ir.Model) -> list[ir.Node]:
    """The nodes of a canonical decoder (onnx_ir.Model) that keep past and present."""
    return [
        node
        for node in model.graph
        if (node.domain, node.op_type) == ("", "Attention") and len(node.inputs) > 4 and node.inputs[4] is not None
    ]


def window_of(node: ir.Node, signature: Signature) -> int:
    """The window of an attention with past, found by the name of its keys; 0 is none."""
    name = uncast(operand(node, 4)).name
    return next((state.window for state in signature.states if state.past.name == name), 0)


def parts_of_mask(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The boolean mask of an attention, and what is added to the products where it is true; None where it has none."""
    mask = optional(node, 3)
    chosen = mask.producer() if mask is not None else None
    if chosen is None or chosen.op_type != "Where":
        return mask, None
    return operand(chosen, 0), operand(chosen, 1)


def require_windows(model: ir.Model, signature: Signature) -> None:
    """Compute the graph's own masks for a few lengths, padded rows among them, and compare them with the signature's
    windows.

    Raises EngineError when an attention sees other positions: its kernel would have to read the graph's mask.
    """
    masks = [(parts_of_mask(node)[0], window_of(node, signature)) for node in attentions(model)]
    found = {(str(mask.name) if mask is not None else "", window) for mask, window in masks}
    for name, window in sorted(found):
        compute = _computed(model, signature, name)
        for past, sequence, allowed in _calls(window, signature.longest):
            mask = compute(past, sequence, allowed) if compute else None
            expected = seen(past, sequence, allowed, window)
            if mask is None or not np.array_equal(np.broadcast_to(mask, expected.shape), expected):
                limit = f", the latest {window} of them" if window else ""
                raise EngineError(
                    f"the decoder's attention mask '{name}' is not causal over the positions that "
                    f"{signature.decoder.mask} allows{limit}, expected that: this target builds the mask itself. Use "
                    "one that keeps the graph's own mask, or build the bundle again"
                )


def seen(past: int, sequence: int, allowed: Array, window: int) -> Array:
    """bool [batch, 1, sequence, past + sequence]: which positions each new one sees. `allowed` is attention_mask
    [batch, total].
    """
    rows, columns = np.arange(sequence)[:, None] + past, np.arange(past + sequence)
    causal = (columns <= rows) & ((columns > rows - window) if window else True)
    return np.asarray(causal[None, None] & (allowed != 0)[:, None, None])


def _calls(window: int, longest: int) -> Iterator[tuple[int, int, Array]]:
    """Past and new positions of calls and their attention masks: short ones, and those that cross the window."""
    crossing = ((1, window - 2, 5), (1, window + 3, 1)) if window > 2 else ()
    for batch, past, sequence in ((1, 0, 5), (2, 7, 1), (2, 4, 3), *crossing):
        if past + sequence <= longest:
            allowed = np.ones((batch, past + sequence), np.int64)
            allowed[-1, : past // 2] = 0
            yield past, sequence, allowed


def _computed(model: ir.Model, signature: Signature, name: str) -> Callable[[int, int, Array], Array | None] | None:
    """A function that computes the value of that name by ONNX Runtime, for past and new positions and an attention
    mask. None where the value depends on anything else.
    """
    port, ir = signature.decoder, require("onnx_ir", "export")
    part = model.clone()
    value = next((output for node in part.graph for output in node.outputs if output.name == name), None)
    if value is None:
        return None
    part.graph.outputs.clear()
    part.graph.outputs.append(value)
    require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(part)
    used = {found.name for found in part.graph.inputs if found.uses()}
    part.graph.inputs[:] = [found for found in part.graph.inputs if found.name in used]
    if any(state.past.name in used for state in signature.states):
        return None
    runtime = require("onnxruntime", "onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        ir.to_proto(part).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def compute(past: int, sequence: int, allowed: Array) -> Array | None:
        lengths = port.lengths(past, sequence, len(allowed))
        feed = {
            tensor.name: np.zeros(tensor.shape(lengths), tensor.dtype)
            for tensor in signature.inputs
            if tensor.name in used
        }
        if port.mask in feed:
            feed[port.mask] = allowed
        found: Array = session.run([name], feed)[0]
        return found if found.dtype == np.bool_ else None

    return compute
