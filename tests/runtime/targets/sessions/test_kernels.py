"""The tables of kernels, and nodes that are not in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from runtime.errors import EngineError
from runtime.targets.sessions.kernels import CUDA, DIRECTML, Provider, check, covers, kernels, outside
from tests.runtime.targets.conftest import toy, value

HALF, FLOAT, INT64, BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BFLOAT16


@pytest.mark.parametrize("provider", [DIRECTML, CUDA], ids=lambda provider: provider.name)
def test_the_table_is_of_operators_of_the_standard(provider: Provider) -> None:
    """Each operator exists, in each version that is named, with each type variable and type."""
    from onnx import defs

    known = {
        (schema.name, schema.since_version): schema
        for schema in defs.get_all_schemas_with_history()
        if not schema.domain
    }
    gone = {"Affine", "Crop", "ImageScaler", "Scatter"}
    for (domain, operator), entries in kernels(provider.table).items():
        assert domain in ("", "com.microsoft") and entries
        for entry in entries:
            named = set().union(*entry.types.values())
            assert named <= {name.lower() for name in ir.DataType.__members__}, operator
            if domain:
                assert entry.outputs and set(entry.types) - {"T3", "T_CACHE"} <= {*entry.inputs, *entry.outputs}, (
                    operator
                )
                continue
            versions = {version for name, version in known if name == operator}
            assert versions & entry.versions or operator in gone, f"{operator} has versions {sorted(versions)}"
            for version in versions & entry.versions:
                schema = known[operator, version]
                variables = {found.type_param_str: set(found.allowed_type_strs) for found in schema.type_constraints}
                assert set(entry.types) & set(variables) or not variables, f"{operator} {version}: {sorted(variables)}"


def test_facts_that_decide_the_lowering() -> None:
    assert [
        covers(DIRECTML, name) for name in ("Conv", "Equal", "DequantizeLinear", "Where", "InstanceNormalization")
    ] == [True] * 5
    assert not any(
        covers(DIRECTML, name) for name in ("Attention", "Gelu", "GroupNormalization", "ScatterElements", "ScatterND")
    )
    assert covers(CUDA, "Gelu") and covers(CUDA, "Sin") and not covers(CUDA, "Equal")
    (newest,) = (entry for entry in kernels(DIRECTML.table)["", "DequantizeLinear"] if 21 in entry.versions)
    assert newest.types["T1"] == {"int4", "int8", "uint4", "uint8"} and newest.types["T2"] == {"float", "float16"}
    (grouped,) = kernels(CUDA.table)["com.microsoft", "GroupQueryAttention"]
    assert grouped.types["T"] == {"float16", "bfloat16"}, "no float32: such decoders have caches of fixed length there"
    assert {21, 22} <= {version for entry in kernels(CUDA.table)["", "Reshape"] for version in entry.versions}, (
        "ranges are read"
    )


def node(operator: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Node:
    return ir.node(operator, list(inputs), attributes, domain=domain, name=f"planted/{operator}")


def graph(planted: ir.Node, opset: int = 21) -> ir.Model:
    inputs = [item for item in planted.inputs if item is not None]
    model = toy([planted], inputs, opset=opset)
    if planted.domain:
        model.opset_imports[planted.domain] = 1
    return model


DOUBLE = ir.DataType.DOUBLE
PLANTED = [
    (node("Det", value("x", [2, 3, 3])), "Det: version 22|Det: version 11, it has none"),
    (node("Swish", value("x", [2])), r"Swish: opset 21 has no such operator"),
    (node("ScatterElements", value("x", [4]), value("i", [2], INT64), value("u", [2])),
        "ScatterElements: version 18, it has 11, 13, 16"),
    (node("MatMul", value("a", [2, 2], DOUBLE), value("b", [2, 2], DOUBLE)),
        "MatMul: T is double, it has float, float16"),
    (node("Conv", value("x", [1, 2, 4, 4], BFLOAT16), value("w", [2, 2, 1, 1], BFLOAT16)),
        "Conv: T is bfloat16, it has float, float16"),
    (node("Range", *(value(name, [], ir.DataType.DOUBLE) for name in "abc")),
        "Range: T is double, it has float, int16, int32, int64"),
    (node("Relu", value("x", [2]), made_up=1), "Relu: version 14 has no attribute made_up"),
    (node("MultiHeadAttention", *(value(name, [1, 2, 8], BFLOAT16) for name in "qkv"), domain="com.microsoft",
        num_heads=2),
     "com.microsoft.MultiHeadAttention: T is bfloat16, it has float, float16"),
    (node("BiasSoftmax", value("x", [2, 2]), value("b", [2, 2]), domain="com.microsoft", axis=1, is_inner_broadcast=0),
     "com.microsoft.BiasSoftmax: version 1, it has none"),
    (node("Mine", value("x", [2]), domain="my.domain"), r"my\.domain\.Mine: version 1, it has none"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "message"), PLANTED, ids=lambda item: item.op_type if isinstance(item, ir.Node) else ""
)
def test_a_planted_node_is_refused_by_name(planted: ir.Node, message: str) -> None:
    for output in planted.outputs:
        output.type = planted.inputs[0].type if planted.inputs[0] is not None else None
    with pytest.raises(
        EngineError,
        match=f"could not compile toy: DirectML has no kernel for node 'planted/{planted.op_type}' .*({message})",
    ):
        check(graph(planted), DIRECTML, "toy")


def test_a_graph_of_another_opset_is_refused() -> None:
    with pytest.raises(EngineError, match="the graph declares opset 23"):
        check(graph(node("Relu", value("x", [2])), opset=23), DIRECTML, "toy")


def test_many_are_counted() -> None:
    values = [value("x", [2])]
    nodes = []
    for number in range(7):
        made = ir.node("Swish", [values[-1]], name=f"swish{number}")
        made.outputs[0].name, made.outputs[0].type = f"y{number}", values[0].type
        values.append(made.outputs[0])
        nodes.append(made)
    with pytest.raises(EngineError, match=r"'swish4' .*, and 2 more"):
        check(toy(nodes, values[:1], opset=21), DIRECTML, "toy")


def test_types_follow_from_the_nodes() -> None:
    """Values that a tracer gave no type: the checker finds what they are."""
    x = value("x", ["n", 3])
    shape = ir.node("Shape", [x], {"start": 0, "end": 1}, name="shape")
    narrow = ir.node("Cast", [shape.outputs[0]], {"to": FLOAT}, name="cast")
    less = ir.node("Less", [narrow.outputs[0], narrow.outputs[0]], name="less")
    model = toy([shape, narrow, less], [x], opset=21)
    assert not list(outside(model, DIRECTML)) and not list(outside(model, CUDA))
    assert [made.outputs[0].dtype for made in (shape, narrow, less)] == [INT64, FLOAT, ir.DataType.BOOL]


def test_what_half_lacks_is_named() -> None:
    planted = node("Reciprocal", value("x", [2], BFLOAT16))
    ((found, reason),) = outside(graph(planted), CUDA)
    assert found is planted and reason == "T is bfloat16, it has double, float, float16"


def test_an_operand_left_out_has_no_type() -> None:
    x = value("x", [1, 2, 4, 4])
    made = ir.node("Resize", [x, None, ir.Value(name="scales")], {"mode": "nearest"}, name="resize")
    model = toy([made], [x], {"scales": np.array([1, 1, 2, 2], np.float32)}, opset=21)
    assert not list(outside(model, DIRECTML))
