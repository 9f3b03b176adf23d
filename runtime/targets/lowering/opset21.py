"""A graph in operators that a provider has kernels for: opset 21, and newer operators expressed by those in the table
of `kernels`.

Attention            MultiHeadAttention; over a cache of fixed length: products, Softmax and the mask added
Equal                neither less nor greater
Gelu                 Gelu and FastGelu of ONNX Runtime
GroupNormalization   InstanceNormalization of the groups, then the channels' scale and bias
RMSNormalization     its formula
TensorScatter        Gather and Where
others               the function body in the standard's schema, such as that of RotaryEmbedding
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from runtime.errors import EngineError
from runtime.optional import require
from runtime.targets.lowering.attention import (
    CONTRIB,
    Graph,
    heads,
    is_attention,
    pack,
    replace,
    scale,
    with_multihead,
)
from runtime.targets.lowering.masks import parts_of_mask
from runtime.targets.lowering.products import as_products
from runtime.targets.lowering.static_cache import INDICES
from runtime.targets.lowering.values import dtype_of, maker, operand, shape_of
from runtime.targets.sessions.kernels import OPSET, Provider, covers, kernels

if TYPE_CHECKING:
    import onnx_ir as ir

BODIES: Final = "enginecast.bodies"
"""Domain of operators while they are replaced by the function bodies of the standard."""
NEWEST: Final = 24


def to_opset21(model: ir.Model, provider: Provider, steps: int = 0) -> None:
    """Lower a graph in place.

    `steps` makes a graph with a cache of fixed length (`static_cache`), which has so many positions, the graph for one
    new position a call: its attention is GroupQueryAttention and updates the cache in place. With more positions
    DirectML's kernel ignores the content of the cache (DmlOperatorGroupQueryAttention.cpp), and masks.
    """
    graph = Graph(model)
    if steps:
        _with_grouped_steps(graph, steps)
    with_multihead(model, spread=provider.spread)
    _inline_bodies(model, provider)
    rules = {name: rule for name, rule in RULES.items() if not covers(provider, name)}
    for node in list(model.graph):
        if not node.domain and node.op_type in rules:
            rules[node.op_type](graph, node)
    for node in model.graph:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear") and "output_dtype" in node.attributes:
            del node.attributes["output_dtype"]  # of opset 23; what it says follows from the scale
    require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(model)
    model.opset_imports[""] = OPSET
    model.opset_imports[CONTRIB] = 1


def _group_normalization(graph: Graph, node: ir.Node) -> None:
    values, weight, offset = (operand(node, index) for index in range(3))
    groups, dtype = node.attributes["num_groups"].as_int(), dtype_of(values)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    rank = len(shape_of(values))
    ones = graph.constant(f"ones.{groups}.{dtype.name.lower()}", np.ones(groups), dtype.numpy())
    zeros = graph.constant(f"zeros.{groups}.{dtype.name.lower()}", np.zeros(groups), dtype.numpy())
    shape = graph.before(node, node.name, "Shape", values, like=graph.constant("groups.axes", [0]))
    split = graph.before(
        node, f"{node.name}/groups", "Reshape", values, graph.constant(f"split.{groups}", [0, groups, -1])
    )
    normal = graph.before(node, node.name, "InstanceNormalization", split, ones, zeros, epsilon=epsilon)
    result = graph.before(node, f"{node.name}/joined", "Reshape", normal, shape)
    channels = graph.constant(f"channels.{rank}", [-1] + [1] * (rank - 2))
    for op, by, name in (("Mul", weight, "weight"), ("Add", offset, "bias")):
        wide = graph.before(node, f"{node.name}/{name}", "Reshape", by, channels)
        result = graph.before(node, f"{node.name}/{name}", op, result, wide)
    graph.instead(node.outputs[0], result)
    graph.drop(node)


def _gelu(graph: Graph, node: ir.Node) -> None:
    near = "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh"
    made = graph.before(node, node.name, "FastGelu" if near else "Gelu", node.inputs[0], domain=CONTRIB)
    graph.instead(node.outputs[0], made)
    graph.drop(node)


def _rms_normalization(graph: Graph, node: ir.Node) -> None:
    """x / sqrt(mean(x^2) + epsilon) * scale, in float32 where the type is another one, as the standard's stash_type
    says.
    """
    values, weight = operand(node, 0), operand(node, 1)
    single = graph.ir.DataType.FLOAT
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    rank = len(shape_of(values))
    axes = graph.constant(f"rms.axes.{axis % rank}.{rank}", list(range(axis % rank, rank)))
    wide = values
    if values.dtype != single:
        wide = graph.before(
            node, f"{node.name}/wide", "Cast", values, to=single, like=graph.ir.Value(type=graph.ir.TensorType(single))
        )
    squares = graph.before(node, f"{node.name}/squares", "Mul", wide, wide)
    mean = graph.before(node, node.name, "ReduceMean", squares, axes, keepdims=1)
    shifted = graph.before(
        node, f"{node.name}/shifted", "Add", mean, graph.constant(f"rms.epsilon.{epsilon}", epsilon, np.float32)
    )
    normal = graph.before(node, node.name, "Div", wide, graph.before(node, node.name, "Sqrt", shifted))
    if values.dtype != single:
        normal = graph.before(node, f"{node.name}/narrow", "Cast", normal, to=values.dtype, like=values)
    graph.instead(node.outputs[0], graph.before(node, node.name, "Mul", normal, weight))
    graph.drop(node)


def _equal(graph: Graph, node: ir.Node) -> None:
    truth = graph.ir.Value(type=graph.ir.TensorType(graph.ir.DataType.BOOL))
    less, greater = (
        graph.before(node, node.name, op, *node.inputs, like=truth) for op in ("LessOrEqual", "GreaterOrEqual")
    )
    graph.instead(node.outputs[0], graph.before(node, node.name, "And", less, greater))
    graph.drop(node)


def _scatter(graph: Graph, node: ir.Node) -> None:
    """Write new keys or values [batch, heads, sequence, size] into the cache at their start. The table has no kernels
    for the latest Scatter operators.

    Each position of the cache takes the new value at its place, or keeps its own. All rows begin at the same position.
    """
    cache, new, starts = (operand(node, index) for index in range(3))
    capacity = shape_of(cache)[2]
    assert isinstance(capacity, int), "the cache has a fixed length"
    source, inside = _places(graph, starts, new, capacity)
    taken = graph.before(node, f"{node.name}/taken", "Gather", new, source, axis=2)
    graph.instead(node.outputs[0], graph.before(node, node.name, "Where", inside, taken, cache, like=cache))
    graph.drop(node)


def _places(graph: Graph, starts: ir.Value, new: ir.Value, capacity: int) -> tuple[ir.Value, ir.Value]:
    """For each position of a cache, which of the new ones it takes, int64 [capacity], and whether it takes any, bool
    [1, 1, capacity, 1].

    They are the same for all layers, and are made once.
    """
    made = {
        node.name: node.outputs[0]
        for node in graph.graph
        if node.name in ("places.source/Min", "places.inside/Unsqueeze")
    }
    if made:
        return made["places.source/Min"], made["places.inside/Unsqueeze"]
    place = next(node for node in graph.graph if node.op_type == "TensorScatter")
    zero, one = graph.constant("places.zero", [0]), graph.constant("places.one", [1])
    columns = graph.constant("places.columns", np.arange(capacity))
    start = graph.before(place, "places.start", "Slice", starts, zero, one)
    length = graph.before(place, "places.length", "Shape", new, like=starts, start=2, end=3)
    offset = graph.before(place, "places.offset", "Sub", columns, start)
    last = graph.before(place, "places.last", "Sub", length, one)
    source = graph.before(
        place, "places.source", "Min", graph.before(place, "places.source", "Max", offset, zero), last
    )
    truth = graph.ir.Value(type=graph.ir.TensorType(graph.ir.DataType.BOOL))
    behind = graph.before(place, "places.behind", "GreaterOrEqual", offset, zero, like=truth)
    ahead = graph.before(place, "places.ahead", "Less", offset, length, like=truth)
    both = graph.before(place, "places.inside", "And", behind, ahead)
    return source, graph.before(place, "places.inside", "Unsqueeze", both, graph.constant("places.axes", [0, 1, 3]))


def _with_grouped_steps(graph: Graph, capacity: int) -> None:
    """Replace attention over TensorScatter by GroupQueryAttention, for one new position a row.

    The total length is that of the buffers, a constant: a kernel is compiled again when it changes. Valid positions
    follow from the indices.
    """
    ir = graph.ir
    indices = next(value for value in graph.graph.inputs if value.name == INDICES)
    first = graph.graph[0]
    last = graph.before(first, "steps.last", "Cast", indices, to=ir.DataType.INT32)
    last.type = ir.TensorType(ir.DataType.INT32)
    total = graph.constant("steps.total", capacity, np.int32)
    for node in [node for node in graph.graph if is_attention(node) and _steps_grouped(node)]:
        scatters = [maker(operand(node, index)) for index in (1, 2)]
        count, groups, _ = heads(node)
        new = [operand(node, 0), *(operand(scatter, 1) for scatter in scatters)]
        packed = [pack(graph, node, tensor) for tensor in new]
        inputs = [*packed, *(scatter.inputs[0] for scatter in scatters), last, total]
        attributes = {"num_heads": count, "kv_num_heads": groups, "scale": scale(node)}
        fused = ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3, name=node.name)
        graph.graph.insert_before(node, fused)
        fused.outputs[0].name, fused.outputs[0].type = f"{node.name}.packed", node.outputs[0].type
        replace(graph, node, fused.outputs[0], count)
        for scatter, present in zip(scatters, fused.outputs[1:], strict=True):
            graph.instead(scatter.outputs[0], present)


def _steps_grouped(node: ir.Node) -> bool:
    """Whether an attention reads a cache, and nothing is added to its products, which the kernel takes no input for."""
    keys = operand(node, 1).producer()
    return keys is not None and keys.op_type == "TensorScatter" and parts_of_mask(node)[1] is None


RULES: Final[Mapping[str, Callable[[Graph, ir.Node], None]]] = {
    "Attention": as_products,
    "Equal": _equal,
    "Gelu": _gelu,
    "GroupNormalization": _group_normalization,
    "RMSNormalization": _rms_normalization,
    "TensorScatter": _scatter,
}


def _inline_bodies(model: ir.Model, provider: Provider) -> None:
    """Replace operators that the table lacks and that have no rule by the function bodies of the standard."""
    defs, ir = require("onnx.defs", "export"), require("onnx_ir", "export")
    known = {operator for domain, operator in kernels(provider.table) if not domain} | set(RULES)
    found = [node for node in model.graph if not node.domain and node.op_type not in known]
    version = model.opset_imports[""]
    for number, node in enumerate(found):
        if not defs.has(node.op_type, min(version, NEWEST), ""):
            continue
        body = _body(defs.get_schema(node.op_type, min(version, NEWEST), ""), node)
        if body is None:
            continue
        function = ir.from_proto(body)
        function.domain, function.name = BODIES, f"{node.op_type}.{number}"
        function.opset_imports[""] = version  # what its nodes are in the end is checked with the rest
        model.functions[function.identifier()] = function
        node.domain, node.op_type = BODIES, function.name
        model.opset_imports[BODIES] = 1
    if BODIES in model.opset_imports:
        passes = require("onnx_ir.passes.common", "export")
        passes.InlinePass()(model)
        passes.IdentityEliminationPass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        model.functions.clear()
        del model.opset_imports[BODIES]


def _body(schema: Any, node: ir.Node) -> Any:
    """The standard's function for an operator, for this node's types and attributes; None where it has none."""
    onnx = require("onnx", "export")
    if not schema.has_context_dependent_function:
        return schema.function_body if schema.has_function else None
    ir = require("onnx_ir", "export")
    types = [onnx.TypeProto() if value is None else ir.to_proto(value).type for value in node.inputs]
    version = max(schema.context_dependent_function_opset_versions)
    body = onnx.FunctionProto()
    made = schema.get_context_dependent_function_with_opset_version
    body.ParseFromString(
        made(version, ir.to_proto(node).SerializeToString(), [proto.SerializeToString() for proto in types])
    )
    if not body.node:
        raise EngineError(
            f"node '{node.name}' ({node.op_type}) has no body for these inputs: it has to be lowered by a rule of its "
            "own"
        )
    return body
