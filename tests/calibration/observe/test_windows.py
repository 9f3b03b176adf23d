"""Rows of convolutions: their product with the kernel as a matrix is the convolution, whatever its form."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import calibration.observe.windows
from calibration.observe.lean import lean_session
from calibration.observe.windows import add_windows, parts
from calibration.quantize.layers import weight_layers


def model_of(conv: nn.Conv2d) -> ir.Model:
    """The graph of one convolution."""
    kernel = conv.weight.detach().numpy()
    x = ir.Value(
        name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", kernel.shape[1], "height", "width"])
    )
    w = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(kernel.shape),
        const_value=ir.tensor(kernel, name="w"),
    )
    attributes = {"strides": conv.stride, "pads": [*conv.padding, *conv.padding], "dilations": conv.dilation}
    node = ir.node("Conv", [x, w], attributes, name="conv")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(["batch", len(kernel), None, None])
    return ir.Model(
        ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 23}, name="one"), ir_version=10
    )


@pytest.mark.parametrize("most", [6144, 64])
@pytest.mark.parametrize("form", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
    {"kernel_size": 1},
    {"kernel_size": (1, 3), "dilation": 2}])  # fmt: skip
def test_rows_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch, form: dict[str, object], most: int) -> None:
    monkeypatch.setattr(calibration.observe.windows, "MOST_ROWS", most)
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 8, **form, bias=False)  # type: ignore[arg-type]
    picture = torch.randn(2, 32, 9, 11)
    wanted = (
        nn.functional.unfold(picture, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        .transpose(1, 2)
        .numpy()
    )
    model = model_of(conv)
    (layer,) = weight_layers(model)
    found = add_windows(model, layer, 32)
    assert len(found) == 1 or most == 64
    assert [cut.start for _, cut in found[1:]] == [cut.stop for _, cut in found[:-1]] and found[-1][
        1
    ].stop == conv.weight[0].numel()
    model.graph.outputs.extend(value for node in model.graph for value in node.outputs if value.name in dict(found))
    rows = lean_session(model).run([name for name, _ in found], {"x": picture.numpy()})
    np.testing.assert_allclose(np.concatenate(rows, axis=2), wanted, rtol=1e-6)


def test_of_large_pictures_some_windows_are_looked_at() -> None:
    model = model_of(nn.Conv2d(32, 8, 3, padding=1))
    (layer,) = weight_layers(model)
    ((name, _),) = add_windows(model, layer, 32)
    model.graph.outputs.extend(value for node in model.graph for value in node.outputs if value.name == name)
    session = lean_session(model)
    counts = [
        session.run([name], {"x": np.zeros((1, 32, side, side), np.float32)})[0].shape[1] for side in (32, 64, 200)
    ]
    assert counts == [1024, 22 * 22, 29 * 29]


def test_parts_are_whole_channels_and_blocks() -> None:
    assert parts(23040, 9, 64) == [slice(0, 5760), slice(5760, 11520), slice(11520, 17280), slice(17280, 23040)]
    assert parts(2880, 9, 64) == [slice(0, 2880)]
    assert all((cut.stop - cut.start) % 9 == 0 == cut.start % 64 for cut in parts(17280, 9, 64))
