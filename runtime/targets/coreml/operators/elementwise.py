"""Elementwise operators, and those that reduce axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from runtime.targets.coreml.constants import Constant
from runtime.targets.coreml.operators.base import attribute, given, like, operator, refuse

if TYPE_CHECKING:
    import onnx_ir as ir

UNARY: Final[Mapping[str, str]] = {
    **{
        "Abs": "abs",
        "Ceil": "ceil",
        "Cos": "cos",
        "Erf": "erf",
        "Exp": "exp",
        "Floor": "floor",
        "Not": "logical_not",
        "Relu": "relu",
    },
    **{"Sigmoid": "sigmoid", "Sin": "sin", "Sqrt": "sqrt", "Tanh": "tanh"},
}
BINARY: Final[Mapping[str, str]] = {
    **{
        "Add": "add",
        "And": "logical_and",
        "Equal": "equal",
        "Greater": "greater",
        "GreaterOrEqual": "greater_equal",
        "Less": "less",
    },
    **{
        "LessOrEqual": "less_equal",
        "Max": "maximum",
        "Min": "minimum",
        "Mul": "mul",
        "Or": "logical_or",
        "Pow": "pow",
        "Sub": "sub",
    },
}
REDUCTIONS: Final[Mapping[str, str]] = {
    "ReduceMax": "reduce_max",
    "ReduceMean": "reduce_mean",
    "ReduceMin": "reduce_min",
    "ReduceSum": "reduce_sum",
}
TYPES: Final[Mapping[str, str]] = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "INT64": "int32",
    "INT32": "int32",
    "BOOL": "bool",
}


@operator(*UNARY)
def _unary(t: Any, node: ir.Node) -> Any:
    return getattr(t.mb, UNARY[node.op_type])(x=t.var(node.inputs[0]))


@operator(*BINARY)
def _binary(t: Any, node: ir.Node) -> Any:
    if len(node.inputs) != 2:
        raise refuse(node, f"has {len(node.inputs)} inputs")
    x, y = map(t.var, node.inputs)
    return getattr(t.mb, BINARY[node.op_type])(x=x, y=y)


@operator("Div")
def _div(t: Any, node: ir.Node) -> Any:
    """Integer division: the numbers are lengths, so truncation and floor are the same."""
    x, y = map(t.var, node.inputs)
    whole = t.mb.types.is_int(x.dtype)
    return t.mb.floor_div(x=x, y=y) if whole else t.mb.real_div(x=x, y=y)


@operator("Neg")
def _neg(t: Any, node: ir.Node) -> Any:
    x = t.var(node.inputs[0])
    return t.mb.mul(x=x, y=like(t, x, -1))


@operator("Reciprocal")
def _reciprocal(t: Any, node: ir.Node) -> Any:
    x = t.var(node.inputs[0])
    return t.mb.real_div(x=like(t, x, 1), y=x)


@operator("Gelu")
def _gelu(t: Any, node: ir.Node) -> Any:
    mode = "EXACT" if attribute(node, "approximate", "none") == "none" else "TANH_APPROXIMATION"
    return t.mb.gelu(x=t.var(node.inputs[0]), mode=mode)


@operator("Softmax")
def _softmax(t: Any, node: ir.Node) -> Any:
    return t.mb.softmax(x=t.var(node.inputs[0]), axis=attribute(node, "axis", -1))


@operator("Where")
def _where(t: Any, node: ir.Node) -> Any:
    condition, x, y = map(t.var, node.inputs)
    return t.mb.select(cond=condition, a=x, b=y)


@operator("Identity")
def _identity(t: Any, node: ir.Node) -> Any:
    return t.constant(node.inputs[0]) or t.var(node.inputs[0])


@operator("Constant")
def _constant(t: Any, node: ir.Node) -> Any:
    tensor = attribute(node, "value", None)
    if tensor is None:
        raise refuse(node, "holds no tensor")
    return Constant(tuple(tensor.shape), tensor.numpy().dtype.name, tensor.numpy().dtype.name, tensor.numpy)


@operator("Cast")
def _cast(t: Any, node: ir.Node) -> Any:
    name = t.ir.DataType(attribute(node, "to", 1)).name
    if name not in TYPES:
        raise refuse(node, f"casts to {name.lower()}")
    constant = t.constant(node.inputs[0])
    if constant is not None:
        return constant.cast({"FLOAT": "float32"}.get(name, name.lower()))
    x = t.var(node.inputs[0])
    return x if t.mb.types.builtin_to_string(x.dtype) == TYPES[name] else t.mb.cast(x=x, dtype=TYPES[name])


@operator(*REDUCTIONS)
def _reduce(t: Any, node: ir.Node) -> Any:
    axes = t.numbers(given(node, 1))
    x = t.var(node.inputs[0])
    axes = list(range(x.rank)) if axes is None else [int(axis) for axis in axes]
    return getattr(t.mb, REDUCTIONS[node.op_type])(x=x, axes=axes, keep_dims=bool(attribute(node, "keepdims", 1)))


@operator("ArgMax")
def _argmax(t: Any, node: ir.Node) -> Any:
    if attribute(node, "select_last_index", 0):
        raise refuse(node, "takes the last of equals")
    x = t.var(node.inputs[0])
    return t.mb.reduce_argmax(x=x, axis=attribute(node, "axis", 0), keep_dims=bool(attribute(node, "keepdims", 1)))
