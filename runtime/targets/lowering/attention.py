"""`Attention` of opset 23 as ONNX Runtime's own operators, whose kernels read heads packed as [batch, length, heads *
size].

    Attention without a past          MultiHeadAttention
    Attention with past and present   GroupQueryAttention over buffers that past and present share, with lengths in
                                      place of the mask

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. Graphs are onnx_ir's and are changed in
place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from runtime.bundle.signature import Signature
from runtime.errors import EngineError
from runtime.optional import require
from runtime.targets.lowering.masks import parts_of_mask, require_windows, window_of
from runtime.targets.lowering.values import dtype_of, operand, optional, shape_of, uncast

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB: Final = "com.microsoft"
HEAD_STEP: Final = 8
HEADS_AND_LENGTH: Final = (0, 2, 1, 3)
"""The permutation between [batch, heads, length, size] and [batch, length, heads, size], either way."""


class Graph:
    """Adds nodes and constants to a model."""

    def __init__(self, model: ir.Model) -> None:
        self.ir = require("onnx_ir", "export")
        self.model, self.graph = model, model.graph

    def constant(self, name: str, values: Any, dtype: Any = np.int64) -> ir.Value:
        """The constant of that name, made on first use."""
        if name not in self.graph.initializers:
            tensor = self.ir.tensor(np.array(values, dtype), name=name)
            value = self.ir.Value(
                name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
            self.graph.register_initializer(value)
        found: ir.Value = self.graph.initializers[name]
        return found

    def before(
        self,
        place: ir.Node,
        name: str | None,
        op: str,
        *inputs: ir.Value | None,
        like: ir.Value | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node, inserted before another; its type is that of the value `like`, else of the first
        input.
        """
        node = self.ir.node(op, list(inputs), attributes, domain=domain, name=f"{name}/{op}")
        output: ir.Value = node.outputs[0]
        output.name = f"{name}.{op.lower()}"
        typed = like or inputs[0]
        assert typed is not None, "a node has the type of one of its inputs"
        output.type = None if typed.dtype is None else self.ir.TensorType(typed.dtype)
        self.graph.insert_before(place, node)
        return output

    def drop(self, node: ir.Node) -> None:
        """Remove a node that nothing depends on any more, and its uses of other values."""
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
        self.graph.remove([node], safe=False)

    def instead(self, old: ir.Value, new: ir.Value) -> None:
        """Replace one value by another, which takes its name."""
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.before"
        self.ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def with_multihead(model: ir.Model, spread: bool = False, masked: bool = True) -> int:
    """Replace `Attention` without a past by `MultiHeadAttention`, where queries have as many heads as keys, and return
    how many were. Those with a mask stay unless `masked`.

    `spread` repeats the mask for every row and head, for kernels that do not broadcast it (DirectML's).
    """
    graph = Graph(model)
    found = [
        node
        for node in model.graph
        if is_attention(node)
        and not has_past(node)
        and (masked or optional(node, 3) is None)
        and heads(node)[0] == heads(node)[1]
    ]
    for node in found:
        _multihead(graph, node, spread)
    return len(found)


def is_attention(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == ("", "Attention")


def has_past(node: ir.Node) -> bool:
    return len(node.inputs) > 4 and node.inputs[4] is not None


def heads(node: ir.Node) -> tuple[int, int, int]:
    """Heads of the queries, heads of keys and values, and the size of one, all fixed lengths."""
    query, key = operand(node, 0).shape, operand(node, 1).shape
    if query is not None and key is not None and len(query) == len(key) == 4:
        count, groups, size = query[1], key[1], query[3]
        if isinstance(count, int) and isinstance(groups, int) and isinstance(size, int):
            return count, groups, size
    raise EngineError(
        f"node '{node.name}' is no Attention over [batch, heads, length, size] of known heads and size: build the "
        "bundle again"
    )


def scale(node: ir.Node) -> float:
    """The factor of the products of queries and keys. Raises EngineError for attributes that only `Attention` has."""
    for name, plain in (("is_causal", 0), ("softcap", 0.0), ("qk_matmul_output_mode", 0)):
        if name in node.attributes and node.attributes[name].value != plain:
            raise EngineError(
                f"node '{node.name}' has {name}={node.attributes[name].value}, expected {plain}: this target has no "
                "such kernel"
            )
    if "scale" in node.attributes:
        return float(node.attributes["scale"].as_float())
    return float(heads(node)[2] ** -0.5)


def _multihead(graph: Graph, node: ir.Node, spread: bool) -> None:
    """One `Attention` as `MultiHeadAttention`."""
    query, key, value = (operand(node, index) for index in range(3))
    count, _, _ = heads(node)
    packed = [pack(graph, node, tensor) for tensor in (query, key, value)]
    mask = optional(node, 3)
    given: list[ir.Value | None] = [*packed]
    if mask is not None:
        added = bias(graph, mask, query)
        if spread:
            rows = graph.before(
                node, node.name, "Shape", query, like=graph.constant("attention.packed", [0, 0, -1]), start=0, end=1
            )
            shape = graph.before(
                node, node.name, "Concat", rows, graph.constant(f"attention.bias.{count}", [count, 1, 1]), axis=0
            )
            added = graph.before(node, node.name, "Expand", added, shape)
        given = [*packed, None, None, added]
    made = graph.before(
        node, node.name, "MultiHeadAttention", *given, domain=CONTRIB, num_heads=count, scale=scale(node)
    )
    graph.model.opset_imports[CONTRIB] = 1
    replace(graph, node, made, count)


def bias(graph: Graph, mask: ir.Value, like: ir.Value) -> ir.Value:
    """The additive form of a boolean mask: the lowest number where it is false. There is one for each mask and type."""
    if mask.dtype != graph.ir.DataType.BOOL:
        return mask
    number, kind = dtype_of(like).numpy(), dtype_of(like).name.lower()
    name = f"{mask.name}.bias.{kind}"
    made = next((user.outputs[0] for user, _ in mask.uses() if user.name == f"{name}/Where"), None)
    if made is not None:
        return made
    zero = graph.constant(f"attention.zero.{kind}", 0, number)
    lowest = graph.constant(f"attention.lowest.{kind}", np.finfo(number).min, number)
    first = next(node for node in graph.graph if any(node is user for user, _ in mask.uses()))
    return graph.before(first, name, "Where", mask, zero, lowest, like=like)


def pack(graph: Graph, node: ir.Node, tensor: ir.Value) -> ir.Value:
    """[batch, heads, length, size] packed as [batch, length, heads * size]: the value it was split from, where there is
    one.
    """
    _, count, _, size = shape_of(tensor)
    assert isinstance(count, int) and isinstance(size, int), "heads have a fixed number and size"
    transpose = tensor.producer()
    if (
        transpose is not None
        and transpose.op_type == "Transpose"
        and tuple(transpose.attributes["perm"].as_ints()) == HEADS_AND_LENGTH
    ):
        reshape = operand(transpose, 0).producer()
        source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
        if (
            source is not None
            and source.shape is not None
            and len(source.shape) == 3
            and source.shape[2] == count * size
        ):
            return source
    name = f"{node.name}/{tensor.name}"
    moved = graph.before(node, name, "Transpose", tensor, perm=list(HEADS_AND_LENGTH))
    return graph.before(node, name, "Reshape", moved, graph.constant("attention.packed", [0, 0, -1]))


def replace(graph: Graph, node: ir.Node, packed: ir.Value, count: int) -> None:
    """Replace the attention's output [batch, heads, length, size] by the packed one for all its readers."""
    output = node.outputs[0]
    joined = _joined(output, count)
    if joined is not None:
        graph.instead(joined, packed)
    else:
        shape = graph.constant(f"attention.heads.{count}", [0, 0, count, -1])
        split = graph.before(node, node.name, "Reshape", packed, shape)
        graph.instead(output, graph.before(node, node.name, "Transpose", split, perm=list(HEADS_AND_LENGTH)))
    graph.drop(node)


def _joined(output: ir.Value, count: int) -> ir.Value | None:
    """The value [batch, length, heads * size] that is the only use of an attention's output; None where there is
    another.
    """
    value = output
    for op in ("Transpose", "Reshape"):
        users = list(value.uses())
        if len(users) != 1 or value.is_graph_output() or users[0][0].op_type != op:
            return None
        user = users[0][0]
        if op == "Transpose" and tuple(user.attributes["perm"].as_ints()) != HEADS_AND_LENGTH:
            return None
        value = user.outputs[0]
    size = output.shape[3] if output.shape is not None else None
    fits = (
        isinstance(size, int) and value.shape is not None and len(value.shape) == 3 and value.shape[2] == count * size
    )
    return value if fits else None


def with_grouped_cache(model: ir.Model, signature: Signature) -> None:
    """Replace `Attention` with a past by `GroupQueryAttention`, so that past and present of each state may share a
    buffer.

    It takes the number of valid positions instead of a mask, is causal by itself, and limits itself to the window of a
    layer. States have the type that attention computes in. Raises EngineError when the graph's own masks allow other
    positions, or for heads of a size that its kernels do not have.
    """
    require_windows(model, signature)
    odd = next(
        (node for node in model.graph if is_attention(node) and has_past(node) and not grouped_fits(heads(node)[2])),
        None,
    )
    if odd is not None:
        raise EngineError(
            f"node '{odd.name}' has heads of {heads(odd)[2]} values (head_dim in the model's config), and ONNX "
            "Runtime's "
            f"GroupQueryAttention takes multiples of {HEAD_STEP}: build for another target, such as openvino"
        )
    graph = Graph(model)
    lengths = _valid_lengths(graph, signature.decoder.mask)
    for node in [node for node in model.graph if is_attention(node) and has_past(node)]:
        count, groups, _ = heads(node)
        packed = [pack(graph, node, operand(node, index)) for index in range(3)]
        caches = [cache_of(graph, node, index) for index in (1, 2)]
        attributes = {"num_heads": count, "kv_num_heads": groups, "scale": scale(node)} | local(
            window_of(node, signature)
        )
        bias = parts_of_mask(node)[1]
        added = [] if bias is None else [None, None, None, bias]  # behind rotary tables and positions
        inputs = [*packed, *(past for past, _ in caches), *lengths, *added]
        fused = graph.ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3, name=node.name)
        graph.graph.insert_before(node, fused)
        for (past, place), present in zip(caches, fused.outputs[1:], strict=True):
            grown = graph.graph.outputs[place]
            present.name, present.type, present.shape = grown.name, past.type, grown.shape
            grown.name = f"{grown.name}.before"
            graph.graph.outputs[place] = present
        fused.outputs[0].name, fused.outputs[0].type = f"{node.name}.packed", node.outputs[0].type
        for output in node.outputs[1:]:
            output.name = f"{output.name}.unused"
        replace(graph, node, fused.outputs[0], count)
    model.opset_imports[CONTRIB] = 1
    require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(model)


def grouped_fits(size: int) -> bool:
    """Whether GroupQueryAttention has kernels for heads of that size."""
    return size % HEAD_STEP == 0


def local(window: int) -> dict[str, int]:
    """The attributes that limit a GroupQueryAttention to the latest `window` positions, the newest included."""
    return {"local_window_size": window} if window else {}


def cache_of(graph: Graph, node: ir.Node, index: int) -> tuple[ir.Value, int]:
    """The graph's input with the past of the attention's keys (1) or values (2), and the index of the output that it
    becomes.

    Both lie behind Casts where the graph was lowered to half; then the input gets the type that is computed in.
    """
    cache, present = uncast(operand(node, index + 3)), node.outputs[index]
    cache.type = graph.ir.TensorType(operand(node, index).dtype)
    for place, output in enumerate(graph.graph.outputs):
        producer = output.producer()
        if output is present or (producer is not None and producer.op_type == "Cast" and producer.inputs[0] is present):
            return cache, place
    raise EngineError(f"node '{node.name}' keeps no present that the graph gives: build the bundle again")


def _valid_lengths(graph: Graph, name: str) -> tuple[ir.Value, ir.Value]:
    """seqlens_k [batch] (the last valid position) and the total length, both int32, from the mask of that name."""
    ir, first = graph.ir, graph.graph[0]
    mask = next(value for value in graph.graph.inputs if value.name == name)
    one = graph.constant("seqlens.one", [1])
    count = graph.before(first, "seqlens", "ReduceSum", mask, one, keepdims=0)
    last = graph.before(first, "seqlens", "Sub", count, one)
    length = graph.before(first, "seqlens", "Shape", mask, start=1, end=2)
    total = graph.before(first, "seqlens", "Squeeze", length)
    made = (
        graph.before(first, "seqlens", "Cast", last, to=ir.DataType.INT32),
        graph.before(first, "seqlens.total", "Cast", total, to=ir.DataType.INT32),
    )
    for value in made:
        value.type = ir.TensorType(ir.DataType.INT32)
    return made
