"""Converts the tensors of the Open Inference Protocol to arrays and back. Sizes are checked against the bytes that
arrived before any array is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from runtime import limits
from runtime.bundle.signature import Array, Tensor
from runtime.errors import InvalidInput, did_you_mean, quoted
from serving.enginecast_pb import inference_pb2

DATATYPES: Final = {
    "float32": "FP32",
    "float16": "FP16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}
"""The protocol's name of each dtype of a signature."""
DTYPES: Final = {datatype: np.dtype(name).newbyteorder("<") for name, datatype in DATATYPES.items()}
CONTENTS: Final = {
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "BOOL": "bool_contents",
}
"""The field that holds the elements of each datatype; FP16 has none."""
VARIES: Final = -1
"""The length of a dim that varies between calls."""

Input = inference_pb2.ModelInferRequest.InferInputTensor


def metadata(tensors: Iterable[Tensor]) -> list[inference_pb2.ModelMetadataResponse.TensorMetadata]:
    """Name, datatype and shape of each tensor."""
    return [
        inference_pb2.ModelMetadataResponse.TensorMetadata(
            name=tensor.name,
            datatype=DATATYPES[tensor.dtype],
            shape=[dim if isinstance(dim, int) else VARIES for dim in tensor.dims],
        )
        for tensor in tensors
    ]


def arrays(message: inference_pb2.ModelInferRequest) -> dict[str, Array]:
    """The inputs of a request by name. Raises InvalidInput that names the field."""
    raw = message.raw_input_contents
    limits.INFER_TENSORS.length("inputs", message.inputs)
    if raw and len(raw) != len(message.inputs):
        raise InvalidInput("raw_input_contents", f"has {len(raw)} tensors, expected one of each of inputs")
    found: dict[str, Array] = {}
    for i, tensor in enumerate(message.inputs):
        field = f"inputs[{i}]"
        limits.MODEL_NAME.length(f"{field}.name", tensor.name)
        if tensor.name in found:
            raise InvalidInput(field, f"is {quoted(tensor.name)} for the second time")
        refuse_parameters(field, tensor.parameters)
        found[tensor.name] = _raw(field, tensor, raw[i]) if raw else _typed(field, tensor)
    return found


def refuse_parameters(field: str, parameters: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Raise InvalidInput for parameters that are not among the known ones: none is ignored."""
    for name in parameters:
        if name not in known:
            expected = did_you_mean(name, known) if known else "(none is known)"
            raise InvalidInput(f"{field}.parameters", f"has {quoted(name)}, which is not offered here {expected}")


def _shape(field: str, tensor: Input) -> tuple[int, ...]:
    """The shape of a tensor, within the limits."""
    limits.INFER_DIMS.length(f"{field}.shape", tensor.shape)
    for length in tensor.shape:
        limits.INFER_ELEMENTS.number(f"{field}.shape", length)
    elements = math.prod(max(length, 1) for length in tensor.shape)  # numpy refuses empty arrays of huge other dims
    limits.INFER_ELEMENTS.count(f"{field}.shape", elements)
    return tuple(tensor.shape)


def _dtype(field: str, tensor: Input) -> np.dtype[Any]:
    if tensor.datatype not in DTYPES:
        raise InvalidInput(
            f"{field}.datatype", f"{quoted(tensor.datatype)} is none of a submodel's: {did_you_mean('', DTYPES)}"
        )
    return DTYPES[tensor.datatype]


def _raw(field: str, tensor: Input, data: bytes) -> Array:
    if tensor.HasField("contents"):
        raise InvalidInput(f"{field}.contents", "is set beside raw_input_contents, expected one of them")
    dtype, shape = _dtype(field, tensor), _shape(field, tensor)
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InvalidInput(
            field, f"has {len(data):,} bytes, expected {expected:,} of {tensor.datatype} {list(tensor.shape)}"
        )
    if tensor.datatype == "BOOL" and data.strip(b"\0\1"):
        raise InvalidInput(field, "has bytes that are no BOOL, expected 0 or 1")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _typed(field: str, tensor: Input) -> Array:
    dtype, shape = _dtype(field, tensor), _shape(field, tensor)
    if tensor.datatype not in CONTENTS:
        raise InvalidInput(f"{field}.contents", f"has no field for {tensor.datatype}: send raw_input_contents")
    name = CONTENTS[tensor.datatype]
    for other, _ in tensor.contents.ListFields():
        if other.name != name:
            raise InvalidInput(f"{field}.contents", f"has {other.name}, expected {name} for {tensor.datatype}")
    values = getattr(tensor.contents, name)
    if len(values) != math.prod(shape):
        raise InvalidInput(
            field, f"has {len(values):,} elements, expected {math.prod(shape):,} of shape {list(tensor.shape)}"
        )
    return np.fromiter(values, dtype.newbyteorder("="), len(values)).reshape(shape)


def response(outputs: Mapping[str, Array]) -> inference_pb2.ModelInferResponse:
    """The outputs of a call, raw, in order."""
    message = inference_pb2.ModelInferResponse()
    for name, array in outputs.items():
        datatype = DATATYPES[array.dtype.name]
        message.outputs.add(name=name, datatype=datatype, shape=array.shape)
        message.raw_output_contents.append(np.ascontiguousarray(array, DTYPES[datatype]).tobytes())
    return message
