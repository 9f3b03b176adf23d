"""Where the division of a tensor's channels can go: back from the tensor, through what commutes with scaling channels,
to norms, vectors and the columns of matrices that absorb it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

import onnx_ir as ir

from calibration.quantize.layers import Layer, layer_of, name_of


class Blocked(Exception):
    """Why nothing can absorb the division."""


class _Layout(Enum):
    """Where a value's channels are: its last axis, split [..., H, D], or as heads [..., H, S, D]."""

    LAST = auto()
    SPLIT = auto()
    HEADS = auto()


@dataclass(frozen=True)
class _Channels:
    """The channels of a value that are divided: from `offset` on, of `width`."""

    layout: _Layout
    offset: int
    width: int


@dataclass(frozen=True)
class Site:
    """An operand to divide: a vector, or with `layer` the columns of a matrix; from `offset` of its `width` channels
    on.
    """

    node: ir.Node
    index: int
    offset: int
    width: int
    layer: Layer | None = None

    @property
    def source(self) -> ir.Value:
        """The initializer that holds the operand."""
        if self.layer is not None:
            return self.layer.weight
        vector = _vector(self.node.inputs[self.index])
        assert vector is not None
        return vector


def sites_of(tensor: ir.Value, group: Sequence[Layer]) -> list[Site]:
    """What absorbs the division of a tensor that these layers read. Raises Blocked."""
    for layer in group:
        _require_own(layer)
    return _trace(tensor, {layer.node for layer in group}, _Channels(_Layout.LAST, 0, group[0].matrix[0]))


def _trace(value: ir.Value | None, readers: set[ir.Node], at: _Channels) -> list[Site]:
    """Follow a value, which only `readers` read, back to what can absorb the division of its channels."""
    node = _own_producer(value, readers)
    assert value is not None
    follow = WHEREVER.get(node.op_type)
    if follow is None and at.layout is _Layout.LAST:
        follow = LAST.get(node.op_type)
    if follow is None:
        raise _no_commuting(node)
    return follow(node, value, at)


def _no_commuting(node: ir.Node) -> Blocked:
    return Blocked(f"{node.name} ({node.op_type}) does not commute with the scaling of channels")


def _own_producer(value: ir.Value | None, readers: set[ir.Node]) -> ir.Node:
    """What makes a value that nothing else reads."""
    if value is None or (node := value.producer()) is None:
        raise Blocked("it is an input of the graph" if value is not None else "its producer is not known")
    others = [user for user, _ in value.uses() if user not in readers]
    if others:
        raise Blocked(f"{name_of(others[0])} ({others[0].op_type}) reads {name_of(value)} too")
    if value.is_graph_output():
        raise Blocked(f"{name_of(value)} is an output of the graph")
    return node


def _require_own(layer: Layer) -> None:
    """A weight that something else reads too, such as a tied embedding, cannot be changed."""
    value = layer.weight
    while True:
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or value.is_graph_output():
            raise Blocked(f"weight {name_of(layer.weight)} is used elsewhere too")
        if users[0] is layer.node:
            return
        value = users[0].outputs[0]


def _same(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    return _trace(node.inputs[0], {node}, at)


def _reshape(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    return _trace(node.inputs[0], {node}, replace(at, layout=_before_reshape(node, at.layout, at.width)))


def _transpose(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    """Heads and positions change places."""
    if at.layout is _Layout.LAST:
        raise _no_commuting(node)
    if list(node.attributes.get_ints("perm", ())) != [0, 2, 1, 3]:
        raise Blocked(f"{node.name} moves channels")
    other = _Layout.HEADS if at.layout is _Layout.SPLIT else _Layout.SPLIT
    return _trace(node.inputs[0], {node}, replace(at, layout=other))


def _attention(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    return _trace(_attention_values(node, at.layout), {node}, at)


def _matmul(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    layer = layer_of(node)
    if layer is None:
        raise _no_commuting(node)
    _require_own(layer)
    return [Site(node, 1, at.offset, at.width, layer)]


def _norm(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    """Scale, and bias where there is one, of a norm over the last axis."""
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else None
    if node.attributes.get_int("axis", -1) not in (-1, None if rank is None else rank - 1):
        raise Blocked(f"{node.name} normalises more than the last axis")
    present = [index for index, operand in enumerate(node.inputs) if index and operand is not None]
    if any(not _is_vector(node.inputs[index], at.width) for index in present):
        raise Blocked(f"{node.name} has a scale that is no constant vector")
    return [Site(node, index, at.offset, at.width) for index in present]


def _vector_operand(node: ir.Node, width: int) -> int | None:
    """The first operand that is a constant vector of that many channels."""
    return next((index for index, value in enumerate(node.inputs) if _is_vector(value, width)), None)


def _sum(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    """A sum with a constant vector has both divided."""
    index = _vector_operand(node, at.width)
    if index is None:
        raise Blocked(f"{node.name} adds what is no constant vector")
    return [Site(node, index, at.offset, at.width), *_trace(node.inputs[1 - index], {node}, at)]


def _product(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    """A product has one factor divided, a constant one if there is any."""
    index = _vector_operand(node, at.width)
    if index is not None:
        return [Site(node, index, at.offset, at.width)]
    reasons = []
    for factor in node.inputs:
        if _last(factor) == at.width:
            try:
                return _trace(factor, {node}, at)
            except Blocked as blocked:
                reasons.append(str(blocked))
    raise Blocked(" and ".join(reasons) or f"{node.name} repeats its channels")


def _split(node: ir.Node, value: ir.Value, at: _Channels) -> list[Site]:
    """One part of a tensor that is split along its channels, as gate and value of one projection are."""
    parts, whole = [_last(output) for output in node.outputs], _last(node.inputs[0])
    axis, rank = node.attributes.get_int("axis", 0), None if value.shape is None else len(value.shape)
    if whole is None or None in parts or rank is None or axis not in (-1, rank - 1):
        raise Blocked(f"{node.name} splits another axis, or one whose length is not known")
    before = sum(part or 0 for part in parts[: node.outputs.index(value)])
    return _trace(node.inputs[0], {node}, _Channels(_Layout.LAST, before + at.offset, whole))


_Follow = Callable[[ir.Node, ir.Value, _Channels], list[Site]]
WHEREVER: Final[Mapping[str, _Follow]] = {
    "Relu": _same,
    "Identity": _same,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Attention": _attention,
}
"""How the channels of a node's output are found in its input, by operator."""
LAST: Final[Mapping[str, _Follow]] = {
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "Add": _sum,
    "Mul": _product,
    "Split": _split,
    "MatMul": _matmul,
}
"""The same for channels on the last axis alone."""


def _before_reshape(node: ir.Node, layout: _Layout, width: int) -> _Layout:
    """Where the channels were before a Reshape that merges, splits or leaves them."""
    before, after = (
        [*value.shape] if value is not None and value.shape is not None else []
        for value in (node.inputs[0], node.outputs[0])
    )
    if layout is _Layout.HEADS:
        if [str(dim) for dim in before] == [str(dim) for dim in after]:
            return layout
    elif before and before[-1] == width:
        return _Layout.LAST
    elif (
        len(before) == 4
        and all(isinstance(dim, int) for dim in before[-2:])
        and math.prod(map(int, before[-2:])) == width
    ):
        return _Layout.SPLIT
    raise Blocked(f"{node.name} moves channels")


def _attention_values(node: ir.Node, layout: _Layout) -> ir.Value | None:
    """The values that attention averages, each head of them used by one head of queries, none of them kept
    for later.
    """
    if any(value is not None for value in node.inputs[4:6]) or any(
        output.uses() or output.is_graph_output() for output in node.outputs[1:]
    ):
        raise Blocked(f"{node.name} keeps its values for later")
    queries, values = node.inputs[0], node.inputs[2]
    if layout is _Layout.HEADS:
        heads = [
            value.shape[1] if value is not None and value.shape is not None and len(value.shape) == 4 else None
            for value in (queries, values)
        ]
    else:
        heads = [node.attributes.get_int(name, 0) or None for name in ("q_num_heads", "kv_num_heads")]
    if layout is _Layout.SPLIT or not isinstance(heads[0], int) or heads[0] != heads[1]:
        raise Blocked(f"{node.name} shares each head of values among several heads, or their number is not known")
    return values


def _vector(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a value is, seen through Cast."""
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0] if producer.op_type == "Cast" else None
    return value if value is not None and value.is_initializer() and value.const_value is not None else None


def _is_vector(value: ir.Value | None, width: int) -> bool:
    found = _vector(value)
    return (
        found is not None
        and found.shape is not None
        and found.shape.is_static()
        and _last(found) == math.prod(found.shape.numpy()) == width
    )


def _last(value: ir.Value | None) -> int | None:
    """The length of the last axis, where it is fixed."""
    last = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None
