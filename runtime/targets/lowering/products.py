"""`Attention` of opset 23 as what it computes: a Softmax of products, for targets or graphs without a kernel of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import EngineError
from runtime.targets.lowering.attention import Graph, bias, has_past, heads, is_attention, scale
from runtime.targets.lowering.values import dtype_of, operand, optional, shape_of

if TYPE_CHECKING:
    import onnx_ir as ir


def part_shared_queries(model: ir.Model) -> None:
    """Make products, in place, of each `Attention` without a past whose queries an earlier one reads too: the prompt's
    and those of image adapters.
    """
    graph = Graph(model)
    read: set[ir.Value] = set()
    for node in [node for node in model.graph if is_attention(node) and not has_past(node)]:
        query = operand(node, 0)
        if query in read:
            as_products(graph, node)
        read.add(query)


def as_products(graph: Graph, node: ir.Node) -> None:
    """Replace one `Attention` without a past. Heads that share keys are placed beside each other, so that keys are not
    repeated. Raises EngineError for grouped heads over keys of varying length.
    """
    query, key, value = (operand(node, index) for index in range(3))
    count, groups, size = heads(node)
    length = shape_of(key)[2]
    scaled = graph.before(node, node.name, "Mul", query, _number(graph, scale(node), query))
    if count != groups:
        if not isinstance(length, int):
            raise EngineError(
                f"node '{node.name}' has grouped heads over keys of varying length, expected a cache of fixed length"
            )
        scaled = graph.before(
            node, f"{node.name}/groups", "Reshape", scaled, graph.constant(f"groups.{groups}", [0, groups, -1, size])
        )
    turned = graph.before(node, f"{node.name}/keys", "Transpose", key, perm=[0, 1, 3, 2])
    products = graph.before(node, f"{node.name}/products", "MatMul", scaled, turned)
    if count != groups:
        products = graph.before(
            node, f"{node.name}/heads", "Reshape", products, graph.constant(f"heads.{count}", [0, count, -1, length])
        )
    mask = optional(node, 3)
    if mask is not None:
        products = graph.before(node, f"{node.name}/masked", "Add", products, bias(graph, mask, query))
    shares = graph.before(node, f"{node.name}/shares", "Softmax", products, axis=-1)
    if count != groups:
        shares = graph.before(
            node, f"{node.name}/shares", "Reshape", shares, graph.constant(f"shares.{groups}", [0, groups, -1, length])
        )
    result = graph.before(node, f"{node.name}/result", "MatMul", shares, value)
    if count != groups:
        result = graph.before(
            node, f"{node.name}/result", "Reshape", result, graph.constant(f"result.{count}", [0, count, -1, size])
        )
    graph.instead(node.outputs[0], result)
    graph.drop(node)


def _number(graph: Graph, number: float, like: ir.Value) -> ir.Value:
    return graph.constant(f"attention.scale.{number}.{dtype_of(like).name.lower()}", number, dtype_of(like).numpy())
