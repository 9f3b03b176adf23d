"""Lowers a canonical graph to half precision, for targets that compute each node in the type that the graph states
(strongly typed networks).

    x float32 ─ Cast ─ [half] ─ [half] ─ Cast ─ [node of `keep`, float32] ─ Cast ─ [half] ─ Cast ─ y float32

The standard's operator schemas say which operators may compute in half, and which of their inputs share a type. Weights
stored in half are read as they are; other constants are converted once, so that no Cast follows a constant.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from runtime.bundle.signature import Array
from runtime.errors import EngineError, InvalidInput
from runtime.optional import require
from runtime.targets.lowering.values import dtype_of, name_of, operand

if TYPE_CHECKING:
    import onnx_ir as ir

Half = Literal["float16", "bfloat16"]

TYPE_ATTRIBUTES: Final = ("to", "dtype", "output_dtype")
"""Attributes that name the type of an output."""
CHUNK: Final = 1 << 20
TOLERANCE: Final = 2.0**-8
"""Norm of the rounding error of a constant, as a share of its own: the step of bfloat16. With a larger one, its reader
stays float32.
"""


def to_half(model: ir.Model, compute: Half, keep: Collection[str] = ()) -> ir.Model:
    """A copy of a canonical graph that computes in `compute`, except for the nodes named in `keep`.

    The types of the graph's inputs and outputs and the names of nodes stay. Nodes also stay float32 whose operator has
    no half form in the standard, or which read a constant that half cannot express: beyond its range, or so small that
    it loses its digits. A graph that already computes in half is returned unchanged. Raises InvalidInput when `keep`
    names a node that the graph lacks; EngineError for graphs with control flow.
    """
    copy = model.clone()
    unknown = set(keep) - {node.name for node in copy.graph}
    if unknown:
        raise InvalidInput(
            "keep", f"names {', '.join(sorted(unknown)[:3])}, which this graph lacks: build the bundle again"
        )
    _Lowering(copy, compute, frozenset(keep)).run()
    require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(copy)
    return copy


class _Lowering:
    """One pass from inputs to outputs. `now` maps a value of the canonical graph to the one that replaces it, in the
    type it was made in.
    """

    def __init__(self, model: ir.Model, compute: Half, keep: frozenset[str]) -> None:
        self.ir, self.model, self.graph, self.keep = require("onnx_ir", "export"), model, model.graph, keep
        types = self.ir.DataType
        self.half, self.single = types[compute.upper()], types.FLOAT
        self.floats = {types.FLOAT, types.FLOAT16, types.BFLOAT16}
        self.schemas = require("onnx.defs", "export")
        self.now: dict[ir.Value, ir.Value] = {}
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        declared = [(value, name_of(value), dtype_of(value)) for value in self.graph.outputs]
        for node in list(self.graph):
            if any(
                attribute.type in (self.ir.AttributeType.GRAPH, self.ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                raise EngineError(
                    f"node '{node.name}' ({node.op_type}) holds a graph of its own, which is not lowered to "
                    f"{self.half.name}"
                )
            if self._is_between_floats(node):
                self.now[node.outputs[0]] = self._current(operand(node, 0))
            else:
                self._node(node)
        for index, (value, name, dtype) in enumerate(declared):
            self.graph.outputs[index] = self._output(self._current(value), name, dtype)

    def _current(self, value: ir.Value) -> ir.Value:
        return self.now.get(value, value)

    def _is_between_floats(self, node: ir.Node) -> bool:
        """Whether the node casts stored weights or earlier results between floats: readers cast as they need. Casts
        from and to integers stay.
        """
        return bool(
            (node.domain, node.op_type) == ("", "Cast")
            and node.attributes["to"].as_int() in self.floats
            and self._current(operand(node, 0)).dtype in self.floats
        )

    def _node(self, node: ir.Node) -> None:
        """Give each input the type that the node computes in, and its outputs the types that follow."""
        inputs = [None if value is None else self._current(value) for value in node.inputs]
        schema = self._schema(node)
        types: dict[str, Any] = {}
        wide = schema is None or node.name in self.keep or not all(map(self._expressible, inputs))
        for index, value in enumerate(inputs):
            if value is None or value.dtype not in self.floats:
                dtype = None if value is None else value.dtype
            elif schema is None:
                dtype = self.single
            else:
                dtype = self._computed(schema, _formal(schema.inputs, index).type_str, wide)
            if schema is not None and dtype is not None:
                types[_formal(schema.inputs, index).type_str] = dtype
            if value is not None and dtype is not None and value.dtype != dtype:
                value = self._as(value, dtype, node)
            node.replace_input_with(index, value)
        for name in TYPE_ATTRIBUTES:
            if name in node.attributes and node.attributes[name].as_int() in self.floats:
                node.attributes[name] = self.ir.AttrInt64(name, int(self.single if wide else self.half))
        for index, output in enumerate(node.outputs):
            dtype = self._made(node, schema, types, index)
            if dtype is not None:
                output.type = self.ir.TensorType(dtype)

    def _schema(self, node: ir.Node) -> Any:
        """The operator's schema; None for one outside of the standard, which is left unchanged."""
        version = self.model.opset_imports.get(node.domain, 1)
        return (
            self.schemas.get_schema(node.op_type, version, node.domain)
            if self.schemas.has(node.op_type, version, node.domain)
            else None
        )

    def _computed(self, schema: Any, variable: str, wide: bool) -> Any:
        """The type in which floats of this type variable are read."""
        allowed = next(
            (found.allowed_type_strs for found in schema.type_constraints if found.type_param_str == variable),
            [variable],
        )
        return self.half if not wide and f"tensor({self.half.name.lower()})" in allowed else self.single

    def _made(self, node: ir.Node, schema: Any, types: dict[str, Any], index: int) -> Any:
        """The type of an output; None where it does not depend on the inputs."""
        for name in TYPE_ATTRIBUTES:
            if name in node.attributes and node.attributes[name].as_int():
                return self.ir.DataType(node.attributes[name].as_int())
        if schema is None:
            return None
        variable = _formal(schema.outputs, index).type_str
        if node.op_type == "DequantizeLinear":  # follows its scale, which the schema cannot say
            variable = schema.inputs[1].type_str
        if variable in types:
            return types[variable]
        fixed = variable.removeprefix("tensor(").removesuffix(")").upper()
        return self.ir.DataType[fixed] if fixed in self.ir.DataType.__members__ else None

    def _expressible(self, value: ir.Value | None) -> bool:
        """Whether half can hold the values of a constant."""
        tensor = None if value is None else value.const_value
        if value is None or tensor is None or value.dtype not in self.floats - {self.half, self.ir.DataType.FLOAT16}:
            return True
        return rounding(tensor.numpy(), self.half.numpy()) <= TOLERANCE

    def _as(self, value: ir.Value, dtype: ir.DataType, before: ir.Node | None) -> ir.Value:
        """The value in another type of float: a converted constant, else a Cast that all readers of that type share."""
        key = value, dtype
        if key not in self.made:
            name = f"{value.name}.{dtype.name.lower()}"
            self.made[key] = (
                self._constant(value, dtype, name) if value.is_initializer() else self._cast(value, dtype, name, before)
            )
        return self.made[key]

    def _constant(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None, "an initializer has a value"

        def convert() -> Any:
            return self.ir.tensor(_rounded(tensor.numpy(), dtype.numpy()), dtype=dtype, name=name)

        converted: ir.Value = self.ir.Value(
            name=name,
            type=self.ir.TensorType(dtype),
            shape=value.shape,
            const_value=self.ir.LazyTensor(convert, dtype, tensor.shape, name=name),
        )
        self.graph.register_initializer(converted)
        return converted

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str, before: ir.Node | None) -> ir.Value:
        node = self.ir.node("Cast", [value], {"to": dtype}, name=f"{name}/Cast")
        cast: ir.Value = node.outputs[0]
        cast.name, cast.type, cast.shape = name, self.ir.TensorType(dtype), value.shape
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return cast

    def _output(self, value: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
        """The graph's output of this name: in the declared type, and made by a node of its own."""
        if value.dtype == dtype and value.name == name:
            return value
        if value.dtype == dtype and value.producer() is not None and not value.is_graph_output():
            value.name = name
            return value
        if value.name == name:
            value.name = f"{name}.{dtype_of(value).name.lower()}"
        if value.dtype != dtype:
            return self._cast(value, dtype, name, None)
        node = self.ir.node("Identity", [value], name=f"{name}/Identity")
        same: ir.Value = node.outputs[0]
        same.name, same.type, same.shape = name, value.type, value.shape
        self.graph.append(node)
        return same


def _formal(parameters: Any, index: int) -> Any:
    """The schema's entry for the operand at that place; the last entry may cover any number of operands."""
    return parameters[min(index, len(parameters) - 1)]


def _rounded(values: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(dtype)


def rounding(values: Array, dtype: Any) -> float:
    """The norm of the rounding error of values in a type of float, as a share of their norm; infinite where they exceed
    its range.
    """
    flat, lost, norm = values.reshape(-1), 0.0, 0.0
    for start in range(0, flat.size, CHUNK):
        exact = flat[start : start + CHUNK].astype(np.float64)
        lost += float(np.square(exact - _rounded(exact, dtype).astype(np.float64)).sum())
        norm += float(np.square(exact).sum())
    return math.sqrt(lost / norm) if norm else 0.0
