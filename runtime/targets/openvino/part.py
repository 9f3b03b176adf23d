"""The first layers of a model, up to a given amount of work: they are timed in place of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from runtime.optional import require

PRODUCTS: Final = ("Convolution", "GroupConvolution", "MatMul")


def work(node: Any) -> int:
    """Multiplications of a node whose shapes are known; only products and attention are counted."""
    kind = node.get_type_name()
    if kind == "ScaledDotProductAttention":
        query, key = (_shape(node.input_value(index)) for index in (0, 1))
        return 2 * _count(query) * key[-2]
    if kind not in PRODUCTS:
        return 0
    result, weights = _count(_shape(node.output(0))), _shape(node.input_value(1))
    if kind == "MatMul":
        return result * weights[-1 if node.get_attributes()["transpose_b"] else -2]
    return result * _count(weights[1:] if kind == "Convolution" else weights[2:])


def where_to_cut(model: Any, shapes: Mapping[str, tuple[int, ...]], budget: int) -> tuple[str, int]:
    """The first product that needs `budget` multiplications including its own, "" where there is none, and the
    multiplications of the whole model.

    Sets the model's input shapes.
    """
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    works, behind = list[int](), dict[str, int]()
    end = ""
    for node in model.get_ordered_ops():
        works.append(work(node))
        needed = 1 << (len(works) - 1)  # a bit for each node
        for port in node.inputs():
            needed |= behind[port.get_source_output().get_node().get_friendly_name()]
        behind[node.get_friendly_name()] = needed
        could_end = not end and node.get_type_name() in PRODUCTS and sum(works) >= budget
        if could_end and sum(count for place, count in enumerate(works) if needed >> place & 1) >= budget:
            end = node.get_friendly_name()
    return end, sum(works)


def cut(model: Any, end: str) -> Any:
    """The part of a model that ends with the product of this name, which is its only output; without a name, the model
    itself.
    """
    if not end:
        return model
    nodes = model.get_ordered_ops()
    last = next(node for node in nodes if node.get_friendly_name() == end)
    needed, todo = set[str](), [last]
    while todo:
        node = todo.pop()
        name = node.get_friendly_name()
        if name not in needed:
            needed.add(name)
            todo += [port.get_source_output().get_node() for port in node.inputs()]
    inputs = [node for node in nodes if node.get_type_name() == "Parameter" and node.get_friendly_name() in needed]
    return require("openvino", "openvino").Model([last.output(0)], inputs, model.get_friendly_name())


def _shape(output: Any) -> list[int]:
    return [int(length) for length in output.get_shape()]


def _count(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
