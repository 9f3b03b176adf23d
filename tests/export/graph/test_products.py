"""Products that are split at once: divided, equal in every bit, and left alone where that would not be right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calibration.observe.lean import lean_session
from export.checkpoint.tensors import read_header
from export.graph.trace import trace
from export.graph.weights import attach, write
from runtime.bundle.signature import Dim, Signature, Tensor

SIGNATURE = Signature(
    inputs=(Tensor(name="x", dtype="float32", dims=(Dim(name="batch", min=1, opt=2, max=4), 5, 8)),),
    outputs=(Tensor(name="out", dtype="float32", dims=(Dim(name="batch", min=1, opt=2, max=4), 5, 6)),),
)


class Gated(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 12, bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return (value * torch.sigmoid(gate),)


class ReadTwice(Gated):
    """What is split is used whole as well."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        both = self.proj(x)
        value, gate = both.chunk(2, dim=-1)
        return (value * torch.sigmoid(gate) + both.sum(-1, keepdim=True),)


def attached(module: nn.Module, folder: Path, dtype: torch.dtype) -> ir.Model:
    save_file(
        {name: value.detach().to(dtype) for name, value in module.named_parameters()}, folder / "checkpoint.safetensors"
    )
    model = trace(module.eval().to("meta"), SIGNATURE)
    refs = read_header(folder / "checkpoint.safetensors")[1]
    attach(model, {name: name for name in refs}, refs)
    return model


def splits(model: ir.Model) -> int:
    return sum(node.op_type == "Split" for node in model.graph)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_are_byte_ranges_of_the_same_file(tmp_path: Path, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Gated(bias).to(dtype).float()
    x = torch.randn(3, 5, 8)
    expected = module(x)[0].detach().numpy()
    model = attached(module, tmp_path, dtype)
    assert splits(model) == 0
    assert (
        set(model.graph.initializers) >= {"proj.weight.0", "proj.weight.1"}
        and "proj.weight" not in model.graph.initializers
    )
    parts = [model.graph.initializers[f"proj.weight.{i}"].const_value for i in range(2)]
    assert all(isinstance(part, ir.ExternalTensor) and part.location == "checkpoint.safetensors" for part in parts)
    np.testing.assert_allclose(lean_session(model).run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-6)
    write(model, tmp_path / "out")
    np.testing.assert_allclose(
        lean_session(ir.load(tmp_path / "out" / "model.onnx")).run(None, {"x": x.numpy()})[0],
        expected,
        rtol=1e-5,
        atol=1e-6,
    )


def test_what_is_read_whole_stays_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = ReadTwice(), torch.randn(3, 5, 8)
    expected = module(x)[0].detach().numpy()
    model = attached(module, tmp_path, torch.float32)
    assert splits(model) == 1 and "proj.weight" in model.graph.initializers
    np.testing.assert_allclose(lean_session(model).run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-6)
