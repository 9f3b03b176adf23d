"""Graphs on byte ranges of a checkpoint, and the folder they are written to."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from export.checkpoint.tensors import read_header
from export.graph import weights as graph
from export.graph.trace import trace, without_weights
from export.graph.weights import ALIGNMENT, INLINE_BYTES, MODEL, WEIGHTS, attach, precision, save_traced, write
from runtime.bundle.signature import BATCH, Dim, Signature, Tensor
from runtime.errors import ResourceExhausted

SEQUENCE = Dim(name="sequence", min=1, opt=8, max=64)
VOCABULARY, WIDTH = 40, 32
SIGNATURE = Signature(
    inputs=(Tensor(name="ids", dtype="int64", dims=(BATCH, SEQUENCE), values="below", limit=VOCABULARY),),
    outputs=(Tensor(name="logits", dtype="float32", dims=(BATCH, SEQUENCE, VOCABULARY)),),
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Model(nn.Module):
    """An embedding, a layer with weights large and small, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.head(self.layer(self.norm(self.embedding(ids)))),)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph without weights, as it is kept in the cache."""
    path = tmp_path_factory.mktemp("traced") / "model.onnx"
    with without_weights():
        module = Model()
    save_traced(trace(module, SIGNATURE), path)
    return path


@pytest.fixture(params=DTYPES)
def attached(request: pytest.FixtureRequest, traced: Path, tmp_path: Path) -> tuple[ir.Model, nn.Module]:
    """The graph on a checkpoint's bytes, and the module with the same values in float32."""
    torch.manual_seed(0)
    module = Model().to(DTYPES[request.param])
    state = {name: value.detach().clone() for name, value in module.named_parameters()}
    save_file(state, tmp_path / "checkpoint.safetensors")
    refs = read_header(tmp_path / "checkpoint.safetensors")[1]
    refs["head.weight"] = refs["embedding.weight"]
    model = ir.load(traced)
    attach(model, {name: name for name, _ in module.named_parameters(remove_duplicate=False)}, refs)
    return model, module.float()


def answer(folder: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": ids})[0])


def test_what_is_written_computes_what_torch_does(attached: tuple[ir.Model, nn.Module], tmp_path: Path) -> None:
    model, module = attached
    nbytes = write(model, tmp_path / "out")
    onnx.checker.check_model(tmp_path / "out" / MODEL, full_check=True)
    ids = np.array([[1, 5, 39], [0, 2, 2]])
    expected = module(torch.from_numpy(ids))[0].detach().numpy()
    assert np.abs(answer(tmp_path / "out", ids) - expected).max() < 1e-5 * np.abs(expected).max()
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    (tmp_path / "checkpoint.safetensors").unlink()
    assert np.abs(answer(tmp_path / "elsewhere", ids) - expected).max() < 1e-5 * np.abs(expected).max()
    assert nbytes > sum(tensor.nbytes for tensor in load_file(tmp_path / "elsewhere" / WEIGHTS).values())


def test_the_weights_are_a_safetensors_file_of_the_same_bytes(
    attached: tuple[ir.Model, nn.Module], tmp_path: Path
) -> None:
    write(attached[0], tmp_path / "out")
    published, written = load_file(tmp_path / "checkpoint.safetensors"), load_file(tmp_path / "out" / WEIGHTS)
    published["head.weight"] = published["embedding.weight"]
    assert written and all(torch.equal(written[name], published[name]) for name in written)
    assert sum(tensor.numel() == VOCABULARY * WIDTH for tensor in written.values()) == 1, (
        "shared weights are written once"
    )
    for ref in read_header(tmp_path / "out" / WEIGHTS)[1].values():
        assert ref.offset % ALIGNMENT == 0 and ref.nbytes >= INLINE_BYTES
    small = [
        t
        for t in onnx.load(tmp_path / "out" / MODEL, load_external_data=False).graph.initializer
        if t.data_location == t.DEFAULT
    ]
    assert {"norm.weight", "norm.bias", "layer.bias"} <= {t.name for t in small}


def test_half_precision_is_cast_and_lookups_after_the_lookup(attached: tuple[ir.Model, nn.Module]) -> None:
    model, _ = attached
    stored = str(precision(model))
    assert stored in DTYPES
    for node in model.graph:
        if (
            node.op_type == "Gather"
            and node.inputs[0] is not None
            and node.inputs[0].name in ("embedding.weight", "head.weight")
        ):
            (user,) = {user for user, _ in node.outputs[0].uses()}
            assert (user.op_type == "Cast") == (stored != "float32")
            break
    else:
        raise AssertionError("no lookup")
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert bool(casts) == (stored != "float32")
    assert all(node.outputs[0].dtype == ir.DataType.FLOAT for node in casts)


def test_weights_are_not_read_until_they_are_written(attached: tuple[ir.Model, nn.Module], tmp_path: Path) -> None:
    values = [value.const_value for value in attached[0].graph.initializers.values()]
    external = [value for value in values if isinstance(value, ir.ExternalTensor)]
    assert len(external) >= 4 and {Path(value.path) for value in external} == {tmp_path / "checkpoint.safetensors"}


def test_int4_is_packed_with_the_low_half_first(tmp_path: Path) -> None:
    codes = np.tile(np.arange(-8, 8, dtype=np.int8), 256).reshape(64, 64)
    weight = ir.Value(name="codes", const_value=ir.tensor(codes.astype(ml_dtypes.int4), name="codes"))
    scale = ir.Value(name="scale", const_value=ir.tensor(np.ones(64, np.float32), name="scale"))
    node = ir.node("DequantizeLinear", [weight, scale], {"axis": 1})
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([64, 64])
    made = ir.Graph([], node.outputs, nodes=[node], initializers=[weight, scale], opset_imports={"": 23}, name="g")
    model = ir.Model(made, ir_version=10)
    write(model, tmp_path / "out")
    raw = load_file(tmp_path / "out" / WEIGHTS)["codes"]
    assert raw.dtype == torch.uint8 and raw.shape == (2048,) and raw[0] == 0x98, (
        "-8 in the low half, -7 in the high one"
    )
    session = onnxruntime.InferenceSession(tmp_path / "out" / MODEL, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], codes)
    assert str(precision(model)) == "int4"


@pytest.mark.parametrize("attached", ["float16"], indirect=True)
def test_a_disk_without_room_is_found_before_writing(
    attached: tuple[ir.Model, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(100))
    with pytest.raises(ResourceExhausted, match="free some space or choose another --output"):
        write(attached[0], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("attached", ["float16"], indirect=True)
def test_a_disk_that_fills_up(
    attached: tuple[ir.Model, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(graph, "_copy", fail)
    with pytest.raises(ResourceExhausted, match="the disk filled up while writing"):
        write(attached[0], tmp_path / "out")
