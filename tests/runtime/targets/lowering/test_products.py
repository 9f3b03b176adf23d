"""Attention as products where its queries are shared, beside ONNX Runtime's own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from runtime.targets.lowering.products import part_shared_queries

RNG = np.random.default_rng(0)


def shared() -> ir.Model:
    """Two attentions with the same queries, whose results are added, and one with queries of its own."""

    def value(name: str, length: str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 2, length, 8]))

    inputs = [value("q", "s"), value("p", "s"), *(value(f"{kind}{i}", f"t{i}") for i in range(3) for kind in "kv")]
    by_name = {one.name: one for one in inputs}
    nodes = [
        ir.node("Attention", [by_name[query], by_name[f"k{i}"], by_name[f"v{i}"]], {"scale": 0.3}, name=f"attention{i}")
        for i, query in enumerate("qqp")
    ]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type = f"{node.name}.out", ir.TensorType(ir.DataType.FLOAT)
    total = ir.node("Sum", [node.outputs[0] for node in nodes], name="sum")
    total.outputs[0].name, total.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, [total.outputs[0]], nodes=[*nodes, total], opset_imports={"": 23}, name="shared")
    return ir.Model(graph, ir_version=10)


def test_the_second_of_two_with_the_same_queries_is_made_products() -> None:
    model = shared()
    part_shared_queries(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Attention") == 2 and kinds.count("Softmax") == 1
    lengths = {"q": 5, "p": 5, "k0": 7, "v0": 7, "k1": 4, "v1": 4, "k2": 3, "v2": 3}
    feed = {name: RNG.standard_normal((3, 2, length, 8), np.float32) for name, length in lengths.items()}
    before, after = (
        ort.InferenceSession(ir.to_proto(one).SerializeToString()).run(None, feed)[0] for one in (shared(), model)
    )
    np.testing.assert_allclose(after, before, atol=1e-6)
