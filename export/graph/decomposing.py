"""Exported programs made ready for translation to ONNX without a second trace.

torch decomposes a program by tracing it again. Nearly all operators of our models can be translated as they are; the
others have another form that can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import fx
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.onnx._internal.exporter._fx_passes import remove_assertion_nodes
from torch.onnx._internal.exporter._registration import ONNXRegistry

aten = torch.ops.aten
Decompose = Callable[[ExportedProgram, ONNXRegistry], ExportedProgram]
Form = tuple[OpOverload, tuple[Any, ...], dict[str, Any]]
"""An operator, its arguments and its named arguments."""


def where_needed(decompose: Decompose) -> Decompose:
    """Leaves out torch's decomposition where each operator of a program can be translated, or has a form that can be.
    Programs that change tensors in place are always decomposed.
    """

    def decomposed(program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        known = frozenset(found[0].fx_target for found in registry.functions.values())
        if any(_changes_a_tensor(node) for node in program.graph.nodes):
            return decompose(program, registry)
        remove_assertion_nodes(program.graph_module)
        program.graph.eliminate_dead_code()
        forms = {node: FORMS[node.target](node) for node in program.graph.nodes if node.target in FORMS}
        if not all(forms.get(node) or _translatable(node, known) for node in program.graph.nodes):
            return decompose(program, registry)
        for node, form in forms.items():
            assert form is not None
            node.target, node.args, node.kwargs = form
        return program

    return decomposed


def _changes_a_tensor(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _translatable(node: fx.Node, known: frozenset[Any]) -> bool:
    """Whether torch's decomposition would leave the node as it is, and it has a translation."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if not isinstance(node.target, OpOverload):
        return node.target in known and not isinstance(node.target, HigherOrderOperator)
    if node.target in FORMS:
        return False
    whole = not _is_cia_op(node.target) or _is_preservable_cia_op(node.target)
    return node.target.namespace == "onnx" or (whole and node.target in known)


def _same(node: fx.Node) -> Form:
    return aten.clone.default, node.args[:1], {}


def _evaluated(node: fx.Node) -> Form | None:
    """A dropout outside training."""
    return None if node.args[2] else _same(node)


def _typed(node: fx.Node) -> Form:
    """Of type, device and layout ONNX knows the type."""
    wanted = node.meta["val"].dtype
    return _same(node) if _input(node).dtype == wanted else (aten._to_copy.default, node.args[:1], {"dtype": wanted})


def _flattened(node: fx.Node) -> Form:
    """Axes of which some neighbours are merged."""
    arguments = _arguments(node)
    _, first, last = arguments + (0, -1)[len(arguments) - 1 :]
    rank = max(_input(node).dim(), 1)
    return _viewed(node, range(first % rank), [-1], range(last % rank + 1, rank))


def _unflattened(node: fx.Node) -> Form:
    """One axis that becomes several."""
    _, axis, sizes = _arguments(node)
    rank = _input(node).dim()
    return _viewed(node, range(axis % rank), sizes, range(axis % rank + 1, rank))


def _viewed(node: fx.Node, before: Iterable[int], sizes: Iterable[Any], behind: Iterable[int]) -> Form:
    """Sizes between the axes that stay."""
    return aten.view.default, (node.args[0], [*_lengths(node, before), *sizes, *_lengths(node, behind)]), {}


def _lengths(node: fx.Node, axes: Iterable[int]) -> Iterator[Any]:
    """Those of the input's axes: numbers, or nodes that tell them."""
    for axis in axes:
        length = _input(node).shape[axis]
        if not isinstance(length, int):
            with node.graph.inserting_before(node):
                told = node.graph.call_function(aten.sym_size.int, (node.args[0], axis))
            told.meta = node.meta | {"val": length}
            length = told
        yield length


def _split(node: fx.Node) -> Form | None:
    """Chunks of an axis whose length is fixed."""
    source, chunks, axis = (*_arguments(node), 0)[:3]
    length = _input(node).shape[axis]
    return (aten.split.Tensor, (source, math.ceil(length / chunks), axis), {}) if isinstance(length, int) else None


def _input(node: fx.Node) -> torch.Tensor:
    """What stands for the first input while tracing."""
    value: torch.Tensor = _arguments(node)[0].meta["val"]
    return value


def _arguments(node: fx.Node) -> Any:
    return node.args


def _named(operator: OpOverload) -> Callable[[fx.Node], Form]:
    return lambda node: (operator, node.args, node.kwargs)


FORMS: Final[dict[Any, Callable[[fx.Node], Form | None]]] = {
    aten.dropout.default: _evaluated,
    aten.contiguous.default: _same,
    aten.to.device: _typed,
    aten.to.dtype: _typed,
    aten.to.dtype_layout: _typed,
    aten.reshape.default: _named(aten.view.default),
    aten.flatten.using_ints: _flattened,
    aten.unflatten.int: _unflattened,
    aten.chunk.default: _split,
    aten.__and__.Tensor: _named(aten.bitwise_and.Tensor),
}
"""What torch's decomposition makes of an operator; nothing where that depends on more."""
