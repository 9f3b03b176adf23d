"""A decoder with keys and values in buffers of a fixed length that are updated in place, for targets that compile fixed
shapes.

    canonical   past [batch, heads, past, size] ─┐
                key  [batch, heads, sequence, size] ─ Attention ─ present [batch, heads, past + sequence, size]
    static      cache [batch, heads, capacity, size] ─ TensorScatter(write_indices) ─ cache, the same buffer ─ Attention

TensorScatter is of opset 24 (https://onnx.ai/onnx/operators/onnx__TensorScatter.html). All shapes of a decoding step
are then fixed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from runtime.bundle.signature import Signature
from runtime.errors import EngineError, InvalidInput
from runtime.optional import require
from runtime.targets.lowering.masks import attentions, parts_of_mask, require_windows, window_of
from runtime.targets.lowering.values import dtype_of, maker, operand, shape_of, uncast

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET: Final = 24
INDICES: Final = "write_indices"
"""int64 [batch]: where each row's new keys and values begin, which is the number of positions before them."""


def capacity(signature: Signature, context: int) -> int:
    """Positions that a decoder's caches hold: the requested `context`, where 0 means the model's whole context.

    Raises InvalidInput when it is more than that.
    """
    longest = signature.longest
    if context > longest:
        raise InvalidInput("context", f"is {context}, and the model has {longest} positions")
    return context or longest


def with_static_cache(model: ir.Model, signature: Signature, capacity: int) -> ir.Model:
    """A copy of a canonical decoder with caches of `capacity` positions; they have the type that attention computes in.

    Differences to the signature: the mask is int64 [batch, capacity], zero beyond the positions there are;
    `write_indices` is a new input; each present output is its past input, updated. Rows may be padded on the left.
    Raises EngineError when the graph's attention sees other positions than the signature's windows say
    (`runtime.targets.lowering.masks`).
    """
    ir = require("onnx_ir", "export")
    require_windows(model, signature)
    copy = model.clone()
    graph = copy.graph
    nodes = attentions(copy)
    inputs = {value.name: value for value in graph.inputs}
    allowed = inputs[signature.decoder.mask]
    indices = ir.Value(name=INDICES, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([shape_of(allowed)[0]]))
    graph.inputs.append(indices)
    allowed.shape = ir.Shape([shape_of(allowed)[0], capacity])
    tokens = inputs[signature.decoder.embeddings]
    windows = [window_of(node, signature) for node in nodes]
    masks = _masks(ir, copy, nodes[0], tokens, allowed, indices, capacity, windows)
    for node, window in zip(nodes, windows, strict=True):
        _share(ir, graph, node, masks[window], indices, capacity)
    require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(copy)
    others = {str(node.name) for node, _ in allowed.uses() if node.op_type != "Shape"} - {"cache.mask/Equal"}
    if others:
        raise EngineError(
            f"the decoder reads {allowed.name} outside of attention, in {', '.join(sorted(others)[:3])}: its length "
            "cannot be fixed"
        )
    copy.graph.opset_imports[""] = max(OPSET, copy.graph.opset_imports[""])
    return copy


def _share(ir: Any, graph: ir.Graph, node: ir.Node, mask: ir.Value, indices: ir.Value, capacity: int) -> None:
    """Make one attention write its keys and values into the caches and read them from there."""
    for index in (1, 2):
        new, present = operand(node, index), node.outputs[index]
        cache = uncast(operand(node, index + 3))
        cache.type = ir.TensorType(dtype_of(new))
        batch, heads, _, size = shape_of(cache)
        cache.shape = ir.Shape([batch, heads, capacity, size])
        name = next(output.name for output in graph.outputs if output is present or _casts(output, present))
        scatter = ir.node(
            "TensorScatter", [cache, new, indices], {"axis": -2}, name=f"{node.name}/TensorScatter.{index}"
        )
        updated = scatter.outputs[0]
        updated.type, updated.shape = cache.type, cache.shape
        graph.insert_before(node, scatter)
        place = next(place for place, output in enumerate(graph.outputs) if output.name == name)
        graph.outputs[place].name = f"{name}.grown"
        graph.outputs[place] = updated
        updated.name = name
        node.replace_input_with(index, updated)
    bias = parts_of_mask(node)[1]
    if bias is not None:
        lowest = operand(maker(operand(node, 3)), 2)
        both = ir.node("Where", [mask, bias, lowest], name=f"{node.name}/Where")
        both.outputs[0].type = bias.type
        graph.insert_before(node, both)
        mask = both.outputs[0]
    keep = {key: value for key, value in node.attributes.items() if key != "is_causal"}
    fused = ir.node("Attention", [*node.inputs[:3], mask], keep, name=node.name)
    output = fused.outputs[0]
    output.name, output.type, output.shape = node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, fused)
    ir.convenience.replace_all_uses_with(node.outputs[0], output)
    node.outputs[0].name = f"{output.name}.grown"


def _casts(output: ir.Value, value: ir.Value) -> bool:
    producer = output.producer()
    return producer is not None and producer.op_type == "Cast" and producer.inputs[0] is value


def _masks(
    ir: Any,
    model: ir.Model,
    before: ir.Node,
    tokens: ir.Value,
    allowed: ir.Value,
    indices: ir.Value,
    capacity: int,
    windows: Iterable[int],
) -> dict[int, ir.Value]:
    """bool [batch, 1, sequence, capacity] for each window: the positions that a row sees, always including its own, so
    that padding does not become 0 / 0.
    """
    made: list[Any] = []

    def constant(name: str, values: Any) -> Any:
        tensor = ir.tensor(np.array(values, np.int64), name=f"cache.{name}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        model.graph.register_initializer(value)
        return value

    def node(op: str, *inputs: Any, name: str = "", **attributes: Any) -> Any:
        made.append(ir.node(op, list(inputs), attributes, name=f"cache.{name or 'mask'}/{op}"))
        made[-1].outputs[0].name = f"cache.{name or 'mask'}.{op.lower()}"
        return made[-1].outputs[0]

    zero, one = constant("zero", 0), constant("one", 1)
    columns = constant("columns", np.arange(capacity)[None, None, None])
    length = node("Squeeze", node("Shape", tokens, start=1, end=2))
    steps = node("Unsqueeze", node("Range", zero, length, one), constant("axes.steps", [0, 1, 3]), name="steps")
    starts = node("Unsqueeze", indices, constant("axes.starts", [1, 2, 3]), name="starts")
    rows = node("Add", starts, steps, name="rows")
    real = node("Not", node("Equal", allowed, zero))
    real = node("Unsqueeze", real, constant("axes.mask", [1, 2]))
    causal = node("And", node("LessOrEqual", columns, rows), real)
    own = node("Equal", columns, rows, name="own")
    masks = {}
    for window in sorted(set(windows)):
        name = f"window.{window}" if window else ""
        near = causal
        if window:
            first = node("Sub", rows, constant(f"window.{window}", window), name=name)
            near = node("And", causal, node("Greater", columns, first, name=name), name=name)
        masks[window] = node("Or", near, own, name=name)
        masks[window].type, masks[window].name = ir.TensorType(ir.DataType.BOOL), f"cache.{name or 'mask'}.seen"
    first = next(found for found in model.graph if found.name == before.name)
    model.graph.insert_before(first, made)
    return masks
