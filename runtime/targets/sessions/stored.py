"""The files that a target of ONNX Runtime stores of a submodel: the lowered graph, weights in another type, and a plan
for opening them.

engines/<target>/<submodel>.onnx          the graph; weights lie in the canonical file, as they are
engines/<target>/<submodel>.step.onnx     of a decoder, where one new position has a graph of its own
engines/<target>/<submodel>.safetensors   weights in another type than the canonical ones, where there are such
engines/<target>/<submodel>.json          the plan
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from pydantic import Field, ValidationError

from runtime.bundle.manifest import FileName, Frozen, Submodel
from runtime.bundle.tensors import open_tensors
from runtime.errors import EngineError
from runtime.files import read_regular, written
from runtime.optional import require
from runtime.targets.lowering.nested import WEIGHTS
from runtime.targets.lowering.values import dtype_of

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES: Final = 1024
"""Weights of another type are stored beside the graph from this size on: a graph holds 2 GB at most."""
ALIGNMENT: Final = 64
LARGEST_PLAN: Final = 1 << 20
"""Bytes."""
CODES: Final[Mapping[str, int]] = {"F32": 1, "F16": 10, "BF16": 16}
"""ONNX's number of each type of float (TensorProto.DataType), by the name that safetensors has for it."""
Cache = Literal["", "grouped", "fixed"]


class SessionPlan(Frozen):
    """How a stored submodel is opened. `shapes` are those it runs at; none means any, one session each.

    `cache`: "grouped", past and present in one buffer, which grows; "fixed", of `capacity` positions, past and present
    in two. `nested` are the shapes of weights that are made when it is opened, by the names of the codes they are made
    of (`runtime.targets.lowering.nested`). `step` is the graph for one new position a call, whose past and present
    share a buffer of that capacity.
    """

    graph: FileName
    step: FileName | Literal[""] = ""
    weights: FileName | Literal[""] = ""
    cache: Cache = ""
    capacity: int = 0
    shapes: tuple[Mapping[str, int], ...] = ()
    compute: str = "float32"
    nested: Mapping[str, tuple[int, ...]] = Field(default_factory=dict)


class Weight(NamedTuple):
    """One tensor of a weights file: ONNX's number of its type, its shape, and its bytes, mapped."""

    code: int
    shape: tuple[int, ...]
    data: memoryview


def read_plan(folder: Path, name: str) -> SessionPlan:
    """The plan of a submodel, by its name. Raises EngineError when it is missing or damaged."""
    path = folder / f"{name}.json"
    try:
        return SessionPlan.model_validate_json(read_regular(path, LARGEST_PLAN))
    except OSError:
        raise EngineError(f"could not load {name}: {path} is missing. Build the bundle again for this target") from None
    except ValidationError as error:
        raise EngineError(f"could not compile {path}: it cannot be read ({error}). Build the bundle again") from None


def load_graph(graph: Path) -> ir.Model:
    """A canonical graph. Raises EngineError."""
    try:
        model: ir.Model = require("onnx_ir", "export").load(graph)
        return model
    except Exception as error:  # protobuf's and onnx_ir's own
        raise EngineError(f"could not compile {graph}: it cannot be read ({error}). Build the bundle again") from None


def store(output: Path, submodel: Submodel, plan: SessionPlan, models: Mapping[str, ir.Model]) -> tuple[str, ...]:
    """Write graphs by file name, converted weights and the plan; return the files' names. Graphs must share weights."""
    output.mkdir(parents=True, exist_ok=True)
    weights = f"{submodel.name}.safetensors"
    converted = {name: tensor for model in models.values() for name, tensor in _converted(model)}
    if converted:
        plan = plan.model_copy(update={"weights": weights})
        _write_weights(output / weights, converted)
    for name, model in models.items():
        with written(output / name) as file:
            file.write(without_weights(model, weights).SerializeToString())
    with written(output / f"{submodel.name}.json") as file:
        file.write(plan.model_dump_json(indent=1).encode())
    return (*models, *([weights] if converted else ()), f"{submodel.name}.json")


def _converted(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """The weights whose type was changed (`runtime.targets.lowering.half`), without small ones."""
    for name, tensor in _computed(model):
        if tensor.dtype.name != "INT8":
            yield name, tensor


def _computed(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """The same, and int8 weights that are made from nested ones when the graph is opened."""
    ir = require("onnx_ir", "export")
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.LazyTensor) and (
            value.const_value.nbytes >= INLINE_BYTES or dtype_of(value).name == "INT8"
        ):
            yield name, value.const_value


def without_weights(model: ir.Model, weights: str) -> Any:
    """The graph as a protobuf message that refers to the weights file for converted weights."""
    ir = require("onnx_ir", "export")
    kept = dict(_computed(model))
    for name, tensor in kept.items():
        made = tensor.dtype.name == "INT8"  # of codes in the canonical file, when the graph is opened
        stub = ir.ExternalTensor(
            WEIGHTS if made else weights, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
        )
        model.graph.initializers[name].const_value = stub
    try:
        return ir.to_proto(model)
    finally:
        for name, tensor in kept.items():
            model.graph.initializers[name].const_value = tensor


def _write_weights(path: Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file (https://github.com/huggingface/safetensors#format), one tensor in memory at a time."""
    names = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}
    header, place = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": names[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with written(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def read_weights(path: Path) -> dict[str, Weight]:
    """The tensors of a weights file by name, mapped. Raises EngineError when it is missing or damaged."""
    try:
        return {name: Weight(CODES[one.dtype], one.shape, one.data) for name, one in open_tensors(path).items()}
    except (OSError, ValueError, KeyError) as error:
        raise EngineError(f"could not load {path}: {error}. Build the bundle again") from None
