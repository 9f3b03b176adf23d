"""The first layers of a model: as much work as wanted, with what they need and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.targets.openvino.part import cut, where_to_cut, work

ov: Any = pytest.importorskip("openvino")
ops: Any = pytest.importorskip("openvino.opset15")
SHAPES = {"x": (2, 3, 8, 8), "y": (2, 4)}


def model() -> Any:
    """Two convolutions of x one after the other, the second moved by a product of y."""
    rng = np.random.default_rng(0)
    x, y = ops.parameter([-1, 3, -1, -1], np.float32, name="x"), ops.parameter([-1, 4], np.float32, name="y")
    for node, name in ((x, "x"), (y, "y")):
        node.output(0).get_tensor().set_names({name})
    weights = [
        ops.constant(rng.standard_normal(shape).astype(np.float32)) for shape in ((5, 3, 3, 3), (6, 5, 1, 1), (4, 6))
    ]
    first = ops.convolution(x, weights[0], [1, 1], [1, 1], [1, 1], [1, 1], name="first")
    second = ops.convolution(ops.relu(first), weights[1], [1, 1], [0, 0], [0, 0], [1, 1], name="second")
    moved = ops.matmul(y, weights[2], False, False, name="moved")
    shift = ops.reshape(moved, ops.constant(np.array([-1, 6, 1, 1])), False)
    return ov.Model([ops.add(second, shift)], [x, y], "model")


def test_work_is_counted_in_multiplications() -> None:
    counted = model()
    counted.reshape({name: list(shape) for name, shape in SHAPES.items()})
    found = {node.get_friendly_name(): work(node) for node in counted.get_ordered_ops()}
    assert (found["first"], found["second"], found["moved"]) == (2 * 5 * 64 * 27, 2 * 6 * 64 * 5, 2 * 6 * 4)
    assert sum(found.values()) == sum(found[name] for name in ("first", "second", "moved"))


def test_attention_is_two_products() -> None:
    heads = [ops.parameter([2, 4, length, 16], np.float32) for length in (10, 30, 30)]
    attention = ops.scaled_dot_product_attention(*heads)
    assert work(attention) == 2 * (2 * 4 * 10 * 30 * 16)


def test_a_part_gives_what_the_whole_has_there() -> None:
    end, total = where_to_cut(model(), SHAPES, 2 * 5 * 64 * 27 - 100)
    assert end == "first" and total == 2 * 5 * 64 * 27 + 2 * 6 * 64 * 5 + 2 * 6 * 4
    part, whole = cut(model(), end), model()
    assert [port.any_name for port in part.inputs] == ["x"]
    first = next(node for node in whole.get_ordered_ops() if node.get_friendly_name() == "first")
    both = ov.Model([first.output(0)], [node for node in whole.get_parameters() if node.get_friendly_name() == "x"])
    x = np.random.default_rng(1).standard_normal(SHAPES["x"]).astype(np.float32)
    found, wanted = (next(iter(ov.compile_model(one, "CPU")({"x": x}).values())) for one in (part, both))
    np.testing.assert_array_equal(found, wanted)


def test_what_has_less_work_is_taken_whole() -> None:
    end, _ = where_to_cut(model(), SHAPES, 10**9)
    assert end == "" and len(cut(model(), end).inputs) == 2
