"""A decoder whose keys and values lie in buffers of a fixed length and are written where they stay, for targets that compile shapes.

    canonical   past [batch, heads, past, size] ─┐
                key  [batch, heads, sequence, size] ─ Attention ─ present [batch, heads, past + sequence, size]
    static      cache [batch, heads, capacity, size] ─ TensorScatter(write_indices) ─ cache, the same buffer ─ Attention

TensorScatter is of opset 24 (https://onnx.ai/onnx/operators/onnx__TensorScatter.html). All shapes of a decoding step are then fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from runtime.errors import EngineError, InvalidInput
from runtime.optional import require
from runtime.signature import Array, Signature

OPSET: Final = 24
MASK: Final = "attention_mask"
INDICES: Final = "write_indices"
"""int64 [batch]: where each row's new keys and values begin, which is the number of positions before them."""


def capacity(signature: Signature, context: int) -> int:
    """Positions that a decoder's caches hold: the `context` that is asked for, 0 being all that the model has.

    Raises InvalidInput when it is more than that.
    """
    longest = signature.dims["total"].max
    if context > longest:
        raise InvalidInput("context", f"is {context}, and the model has {longest} positions")
    return context or longest


def with_static_cache(model: Any, signature: Signature, capacity: int) -> Any:
    """A copy of a canonical decoder (onnx_ir.Model) with caches of `capacity` positions; they have the type that attention computes in.

    Differences to the signature: `attention_mask` is int64 [batch, capacity], zero beyond the positions there are; `write_indices` is a new
    input; each present output is its past input, updated. Rows may be padded on the left.
    Raises EngineError when the graph's attention is not causal over the positions that the mask allows: it has to be rebuilt.
    """
    ir = require("onnx_ir", "export")
    copy = model.clone()
    graph = copy.graph
    nodes = [node for node in graph if (node.domain, node.op_type) == ("", "Attention") and len(node.inputs) > 4 and node.inputs[4]]
    _require_causal(ir, model, signature, [node.inputs[3].name if node.inputs[3] is not None else "" for node in nodes])
    inputs = {value.name: value for value in graph.inputs}
    indices = ir.Value(name=INDICES, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([inputs[MASK].shape[0]]))
    graph.inputs.append(indices)
    inputs[MASK].shape = ir.Shape([inputs[MASK].shape[0], capacity])
    sequence = next(tensor.name for tensor in signature.inputs if any(getattr(dim, "name", "") == "sequence" for dim in tensor.dims))
    mask = _mask(ir, copy, nodes[0], inputs[sequence], inputs[MASK], indices, capacity)
    for node in nodes:
        _share(ir, graph, node, mask, indices, capacity)
    require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(copy)
    strangers = {node.name for node, _ in inputs[MASK].uses()} - {"cache.mask/Equal"}
    if strangers:
        raise EngineError(
            f"the decoder reads {MASK} outside of attention, in {', '.join(sorted(strangers)[:3])}: its length cannot be fixed"
        )
    copy.graph.opset_imports[""] = max(OPSET, copy.graph.opset_imports[""])
    return copy


def _require_causal(ir: Any, model: Any, signature: Signature, masks: Iterable[str]) -> None:
    """Compute the graph's own masks for a few lengths and compare them with what `_mask` means, padded rows among them."""
    for name in dict.fromkeys(masks):
        for batch, past, sequence in ((1, 0, 5), (2, 7, 1), (2, 4, 3)):
            lengths = {"batch": batch, "past": past, "sequence": sequence, "total": past + sequence}
            allowed = np.ones((batch, past + sequence), np.int64)
            allowed[-1, : past // 2] = 0
            found = _evaluate(ir, model, signature, name, lengths, allowed)
            rows = np.arange(sequence)[:, None] + past
            expected = (np.arange(past + sequence) <= rows)[None, None] & (allowed != 0)[:, None, None]
            if found is None or not np.array_equal(np.broadcast_to(found, expected.shape), expected):
                raise EngineError(
                    f"the decoder's attention mask '{name}' is not causal over the positions that {MASK} allows, expected that of full "
                    "attention: use a target that keeps the graph's own mask, such as onnxruntime"
                )


def _evaluate(ir: Any, model: Any, signature: Signature, name: str, lengths: Mapping[str, int], allowed: Array) -> Array | None:
    """The value of that name, computed by ONNX Runtime, where it depends on nothing but shapes and the attention mask; else None."""
    part = model.clone()
    value = next((output for node in part.graph for output in node.outputs if output.name == name), None)
    if value is None:
        return None
    part.graph.outputs.clear()
    part.graph.outputs.append(value)
    passes = require("onnx_ir.passes.common", "export")
    passes.RemoveUnusedNodesPass()(part)
    used = {found.name for found in part.graph.inputs if found.uses()}
    part.graph.inputs[:] = [found for found in part.graph.inputs if found.name in used]
    if any(tensor.name in used for tensor in (state.past for state in signature.states)):
        return None
    feed = {tensor.name: np.zeros(tensor.shape(lengths), tensor.dtype) for tensor in signature.inputs if tensor.name in used}
    if MASK in feed:
        feed[MASK] = allowed
    options = require("onnxruntime", "onnxruntime").SessionOptions()
    options.log_severity_level = 3
    session = require("onnxruntime", "onnxruntime").InferenceSession(
        ir.to_proto(part).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: Array = session.run([name], feed)[0]
    return found if found.dtype == np.bool_ else None


def _share(ir: Any, graph: Any, node: Any, mask: Any, indices: Any, capacity: int) -> None:
    """Let one attention write its keys and values into the caches and read them from there."""
    for index in (1, 2):
        new, past, present = node.inputs[index], node.inputs[index + 3], node.outputs[index]
        cache = past.producer().inputs[0] if past.producer() is not None else past  # behind the Cast of a lowered graph
        cache.type = ir.TensorType(new.dtype)
        cache.shape = ir.Shape([cache.shape[0], cache.shape[1], capacity, cache.shape[3]])
        name = next(output.name for output in graph.outputs if output is present or _casts(output, present))
        scatter = ir.node("TensorScatter", [cache, new, indices], {"axis": -2}, name=f"{node.name}/TensorScatter.{index}")
        updated = scatter.outputs[0]
        updated.type, updated.shape = cache.type, cache.shape
        graph.insert_before(node, scatter)
        place = next(place for place, output in enumerate(graph.outputs) if output.name == name)
        graph.outputs[place].name = f"{name}.grown"
        graph.outputs[place] = updated
        updated.name = name
        node.replace_input_with(index, updated)
    keep = {key: value for key, value in node.attributes.items() if key != "is_causal"}
    fused = ir.node("Attention", [*node.inputs[:3], mask], keep, name=node.name)
    output = fused.outputs[0]
    output.name, output.type, output.shape = node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, fused)
    ir.convenience.replace_all_uses_with(node.outputs[0], output)
    node.outputs[0].name = f"{output.name}.grown"


def _casts(output: Any, value: Any) -> bool:
    producer = output.producer()
    return producer is not None and producer.op_type == "Cast" and producer.inputs[0] is value


def _mask(ir: Any, model: Any, before: Any, tokens: Any, allowed: Any, indices: Any, capacity: int) -> Any:
    """bool [batch, 1, sequence, capacity]: allowed positions up to the row's own, and always that one, so that padding is no 0 / 0."""
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
    seen = node("And", node("LessOrEqual", columns, rows), real)
    mask = node("Or", seen, node("Equal", columns, rows, name="own"))
    mask.type, mask.name = ir.TensorType(ir.DataType.BOOL), "cache.mask"
    first = next(found for found in model.graph if found.name == before.name)
    model.graph.insert_before(first, made)
    return mask
