"""Merged rows get their axes back: what becomes of layers between a merging and a division, and what is left alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from calibration.observe.lean import lean_session
from export.graph.trace import trace
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor

WIDTH = 8
ROWS = Dim(name="sequence", min=1, opt=4, max=64)


class FeedForward(nn.Module):
    """A feed-forward layer over merged rows, as OPT has it."""

    def __init__(self, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 12, bias=bias), nn.Linear(12, WIDTH, bias=bias)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), self.fc1, ACT2FN[activation], self.fc2)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        return torch.add(rows, self.mlp(rows))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.rows(x).view(x.shape) * 2,)


class AcrossRows(FeedForward):
    """Something between reads rows of other samples, too."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.fc1(torch.cumsum(self.rows(x), 0)).view(*x.shape[:2], -1)[..., :WIDTH],)


class Merged(FeedForward):
    """Rows are given as they were merged."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.fc2(torch.relu(self.fc1(x.reshape(-1, WIDTH)))),)


class Pooled(FeedForward):
    """One row a sample, from one position or as attention of a single query has it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        one = self.mlp(x[:, 0])
        return (x + one[:, None] + self.fc1(x[:, -1:].transpose(0, 1).reshape(-1, WIDTH))[:, None, :WIDTH],)


def traced(module: nn.Module, rows: Dim | int = ROWS) -> tuple[ir.Model, Counter[str]]:
    """The graph of a module, which computes what the module does, and its operators."""
    tensors = [Tensor(name=name, dtype="float32", dims=(BATCH, rows, WIDTH)) for name in ("x", "y")]
    if isinstance(module, Merged):
        tensors[1] = Tensor(name="y", dtype="float32", dims=(Dim(name="rows", min=1, opt=8, max=256), WIDTH))
    torch.manual_seed(0)
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        expected = module(x)[0].numpy()
    values = {name: value.detach().numpy() for name, value in module.named_parameters(remove_duplicate=False)}
    model = trace(module.eval().to("meta"), Signature(inputs=(tensors[0],), outputs=(tensors[1],)))
    for name, value in values.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = ir.tensor(value, name=name)
    found = lean_session(model).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    return model, Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu"])
def test_layers_between_keep_all_axes(activation: str) -> None:
    model, kinds = traced(FeedForward(activation))
    assert (kinds["MatMul"], kinds["Gemm"], kinds["Reshape"], kinds["Shape"]) == (2, 0, 0, 0)
    shapes = [value.shape for node in model.graph for value in node.outputs if value.shape is not None]
    assert all(len(shape) != 2 for shape in shapes) and model.graph.outputs[0].name == "y"
    names = {node.name for node in model.graph}
    assert {"mlp.0/LayerNormalization", "mlp.1/Transpose", "mlp.1/MatMul", "mlp.1/Add", "mlp.3/MatMul"} <= names


@pytest.mark.parametrize("bias", [True, False])
def test_a_fixed_length_is_merged_rows_too(bias: bool) -> None:
    kinds = traced(FeedForward(bias=bias), rows=5)[1]
    assert (kinds["MatMul"], kinds["Gemm"], kinds["Reshape"]) == (2, 0, 0)


def test_what_reads_several_rows_reads_them_merged() -> None:
    """The rows that it gives are merged by nothing that is known: their product stays a Gemm."""
    model, kinds = traced(AcrossRows())
    assert (kinds["MatMul"], kinds["Gemm"], kinds["CumSum"]) == (2, 1, 1)
    (sums,) = [node for node in model.graph if node.op_type == "CumSum"]
    assert sums.inputs[0] is not None and sums.inputs[0].producer().op_type == "Reshape"  # type: ignore[union-attr]


def test_one_row_a_sample_stays_a_gemm() -> None:
    kinds = traced(Pooled())[1]
    assert (kinds["MatMul"], kinds["Gemm"]) == (0, 3)


def test_an_output_of_merged_rows_stays_one() -> None:
    model, kinds = traced(Merged())
    assert (kinds["MatMul"], kinds["Gemm"], kinds["Reshape"]) == (2, 0, 1) and model.graph.outputs[0].name == "y"
