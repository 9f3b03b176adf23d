"""Graphs and their weights: initializers that refer to byte ranges of the checkpoint, and the folder a finished graph
is written to.
"""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import onnx_ir as ir

from calibration.ground.progress import each
from calibration.quantize.plan import LayerPlan
from calibration.quantize.qdq import code_name, scale_name
from export.checkpoint.source import TensorRef
from export.graph.products import divide_products
from runtime.bundle.manifest import Weights
from runtime.bundle.precision import Precision
from runtime.errors import ResourceExhausted
from runtime.targets.lowering import nested, nf4

MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.safetensors"
INLINE_BYTES: Final = 1024
"""Initializers smaller than this stay in the graph file, where shape inference of every ONNX tool can read them."""
ALIGNMENT: Final = 64
COMPUTE: Final = ir.DataType.FLOAT

STORED: Final[Mapping[str, ir.DataType]] = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F64": ir.DataType.DOUBLE,
}  # fmt: skip
PRECISIONS: Final = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.UINT4: "nf4"}
FLOATS: Final = frozenset(STORED.values())
OTHERS: Final = "no layer multiplies by them, such as tables, norms and biases"
SAFETENSORS: Final[Mapping[ir.DataType, str]] = {
    **{data_type: name for name, data_type in STORED.items()},
    ir.DataType.INT8: "I8", ir.DataType.UINT8: "U8", ir.DataType.INT32: "I32", ir.DataType.INT64: "I64",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
}  # fmt: skip


def save_traced(model: ir.Model, path: Path) -> None:
    """Write a traced graph without its weights: each becomes external data without a place, which `attach` fills in."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None and value.shape is not None
            value.const_value = ir.ExternalTensor("weights", 0, 0, value.dtype, shape=value.shape, name=name)
    ir.save(model, path)


def absent_weights(model: ir.Model) -> list[ir.ExternalTensor]:
    """The weights of a traced graph, which have no place yet."""
    values = [value.const_value for value in model.graph.initializers.values()]
    return [value for value in values if isinstance(value, ir.ExternalTensor)]


def precision(model: ir.Model) -> Precision:
    """The formats of the large weights, and of the inputs of layers that are rounded."""
    sizes: Counter[str] = Counter()
    for name, value in model.graph.initializers.items():
        if (
            value.const_value is not None
            and value.const_value.nbytes >= INLINE_BYTES
            and not name.endswith(nested.FACTORS)
        ):
            sizes[PRECISIONS.get(value.const_value.dtype, value.const_value.dtype.name.lower())] += (
                value.const_value.nbytes
            )
    total = sum(sizes.values()) or 1
    names = [name for name, size in sizes.most_common() if size / total > 0.02]
    rounded = {node.outputs[0].dtype for node in model.graph if node.op_type == "QuantizeLinear"}
    return Precision(
        weights=tuple(names),
        activations="float" if not rounded else "fp8" if rounded == {ir.DataType.FLOAT8E4M3FN} else "int8",
        nested=any(name.endswith(nested.CODES) for name in model.graph.initializers),
    )


def weights_of(
    model: ir.Model, folded: ir.Model, plans: Sequence[LayerPlan], requested: str, kept: str = ""
) -> tuple[Weights, ...]:
    """What the weights of a quantized graph are stored as, most bytes first, each with the reason where that is not
    `requested`.

    `folded` is the float graph that it was made of by these plans. `kept` is the reason of all layers that are
    quantized, if there is one.
    """
    tensors = {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    reasons = {name: OTHERS for name in folded.graph.initializers if name in tensors and tensors[name].dtype in FLOATS}
    reasons |= {code_name(planned) or planned.weight: _why(planned, kept) for planned in plans}
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for name, reason in reasons.items():
        form = PRECISIONS.get(tensors[name].dtype, tensors[name].dtype.name.lower())
        key = form, "" if form == requested else reason
        parts = [tensors[one] for one in (name, scale_name(name), f"{name}{nested.FACTORS}") if one in tensors]
        elements, nbytes = found.get(key, (0, 0))
        found[key] = elements + tensors[name].size, nbytes + sum(part.nbytes for part in parts)
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return tuple(
        Weights(form=form, elements=count, nbytes=size, reason=reason) for (form, reason), (count, size) in ordered
    )


def _why(planned: LayerPlan, kept: str) -> str:
    """The kind of reason why a layer's weight is what it is."""
    return kept if kept and planned.weight_type != "float" else planned.reason.partition(":")[0]


def attach(model: ir.Model, names: Mapping[str, str], weights: Mapping[str, TensorRef]) -> None:
    """Give every parameter of the graph its bytes in the checkpoint, under the checkpoint's own precision.

    The graph computes in float32: a weight stored as float16 or bfloat16 is followed by a Cast, which engines fold or
    fuse. A table that is only looked up is cast after the lookup. Tied weights are one initializer. Products that are
    split at once are divided.
    """
    attached: dict[TensorRef, ir.Value] = {}
    for traced, name in names.items():
        value = model.graph.initializers.get(traced)
        if value is None:
            continue
        ref = weights[name]
        stored = attached.setdefault(ref, _stored(name, ref))
        del model.graph.initializers[traced]
        _replace(model, value, stored)
        model.graph.initializers[str(stored.name)] = stored
    divide_products(model)


def _stored(name: str, ref: TensorRef) -> ir.Value:
    data_type, shape = STORED[ref.dtype], ir.Shape(ref.shape)
    file = ref.file.resolve()  # hub snapshots are links, which ONNX Runtime does not follow out of a folder
    tensor = ir.ExternalTensor(
        file.name, ref.offset, ref.nbytes, data_type, shape=shape, name=name, base_dir=file.parent
    )
    return ir.Value(name=name, type=ir.TensorType(data_type), shape=shape, const_value=tensor)


def _replace(model: ir.Model, value: ir.Value, stored: ir.Value) -> None:
    """Let the users of `value` read `stored` instead, through a Cast where the precisions differ."""
    if stored.dtype == COMPUTE:
        ir.convenience.replace_all_uses_with(value, stored)
        return
    lookups = [node for node, index in value.uses() if node.op_type == "Gather" and index == 0]
    for node in lookups:
        node.replace_input_with(0, stored)
        output = node.outputs[0]
        output.type = stored.type  # a new one: values may share the old one
        cast = _cast(output, f"{node.name}/Cast")
        output.name, cast.outputs[0].name = f"{output.name}.stored", output.name
        ir.convenience.replace_all_uses_with(output, cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, output)
        model.graph.insert_after(node, cast)
    if value.uses():
        cast = _cast(stored, f"{stored.name}/Cast")
        users = {user for user, _ in value.uses()}
        model.graph.insert_before(next(node for node in model.graph if node in users), cast)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])


def _cast(value: ir.Value, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": COMPUTE}, name=name)
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = (
        f"{value.name}.float",
        ir.TensorType(COMPUTE),
        value.shape,
    )
    return cast


def write(model: ir.Model, folder: Path) -> int:
    """Write `model.onnx` and `weights.safetensors` into a new folder, one tensor in memory at a time. Returns the bytes
    written.

    The weights file is a valid safetensors file; the graph refers to its byte ranges as ONNX external data. int4
    and nf4 values, which the format lacks, stand there as bytes of two values, low nibble first, as ONNX packs them.
    Leaves `model` referring to the new files. Raises ResourceExhausted when the disk is full.
    """
    folder.mkdir(parents=True)
    tensors = {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    apart = {
        name for name in tensors if name.endswith((nested.CODES, f"{nested.CODES}{nested.FACTORS}", nf4.CODES))
    }  # engines read them by name
    for name, tensor in tensors.items():
        if tensor.nbytes < INLINE_BYTES and name not in apart:
            model.graph.initializers[name].const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
    large = [(name, tensor) for name, tensor in tensors.items() if tensor.nbytes >= INLINE_BYTES or name in apart]
    large.sort(key=lambda item: item[1].nbytes % ALIGNMENT != 0)  # keeps most offsets aligned
    need, free = sum(tensor.nbytes for _, tensor in large), shutil.disk_usage(folder).free
    if need > free:
        raise ResourceExhausted(
            f"{folder} needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: free some space or choose another "
            "--output"
        )
    try:
        with (folder / WEIGHTS).open("wb") as file:
            file.write(_header(large))
            for name, tensor in each("tensor", large):
                offset, shape = file.tell(), ir.Shape(tensor.shape.numpy())
                _copy(tensor, file)
                moved = ir.ExternalTensor(
                    WEIGHTS, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=folder
                )
                model.graph.initializers[name].const_value = moved
        ir.save(model, folder / MODEL)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                f"the disk filled up while writing {folder}: free some space or choose another --output"
            ) from None
        raise
    return need + (folder / MODEL).stat().st_size


def _header(tensors: list[tuple[str, ir.TensorProtocol]]) -> bytes:
    """Length-prefixed JSON header (safetensors format specification), padded so that the data begins aligned."""
    entries, offset = {}, 0
    for name, tensor in tensors:
        whole = tensor.dtype in SAFETENSORS
        entries[name] = {
            "dtype": SAFETENSORS[tensor.dtype] if whole else "U8",
            "shape": list(tensor.shape.numpy()) if whole else [tensor.nbytes],
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _copy(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    """Append a tensor's bytes. A range of another file is copied by the kernel and never enters this process."""
    if not isinstance(tensor, ir.ExternalTensor):
        file.write(tensor.tobytes())
        return
    with Path(tensor.path).open("rb") as source:
        source.seek(tensor.offset or 0)
        remaining = tensor.nbytes
        while remaining:
            chunk = source.read(min(remaining, 1 << 22))
            file.write(chunk)
            remaining -= len(chunk)
