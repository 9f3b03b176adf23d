"""The canonical graph lowered for TensorRT: in the type that it computes in, decoders with caches of fixed length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from runtime.bundle.manifest import Submodel
from runtime.bundle.signature import Array
from runtime.errors import EngineError
from runtime.optional import require
from runtime.targets.lowering.half import to_half
from runtime.targets.lowering.nested import widen
from runtime.targets.lowering.products import part_shared_queries
from runtime.targets.lowering.static_cache import capacity, with_static_cache
from runtime.targets.tensorrt.settings import TensorRTSettings

STANDARD_DOMAINS: Final = ("", "ai.onnx")
OLDEST_FLOAT32: Final = 80
"""TensorRT for RTX multiplies float32 matrices from compute capability 8.0 on; it refuses them for 7.5."""
OLDEST_FLOAT8: Final = 89
INLINE_BYTES: Final = 1024
"""Converted weights from this size on are handed over by address: a serialized graph holds 2 GB at most."""


class Lowered(NamedTuple):
    """A lowered graph, serialized. Weights lie in the canonical files; those that changed their type, in
    `converted`.
    """

    content: bytes
    converted: Mapping[str, Array]
    oldest: int
    """The first compute capability that has all its types."""


def lower(submodel: Submodel, graph: Path, settings: TensorRTSettings) -> Lowered:
    """The canonical graph in the type that the submodel computes in, a decoder with caches of fixed length."""
    ir = require("onnx_ir", "export")
    try:
        model = ir.load(graph)
    except Exception as error:  # protobuf's and onnx_ir's own
        raise EngineError(f"could not compile {graph}: it cannot be read ({error}). Build the bundle again") from None
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in model.graph if node.domain not in STANDARD_DOMAINS})
    if foreign and not settings.plugins:
        raise EngineError(
            f"could not compile {submodel.name}: it has operators outside of the standard ({', '.join(foreign[:3])}), "
            "which plugins run. "
            "Name the libraries that may be loaded in the setting plugins"
        )
    widen(model)
    part_shared_queries(model)  # TensorRT for RTX 1.7 crashes while it fuses two that share theirs
    if submodel.precision.compute != "float32":
        model = to_half(model, submodel.precision.compute, submodel.keep)
    if submodel.signature.states:
        model = with_static_cache(model, submodel.signature, capacity(submodel.signature, settings.context))
    converted = {}
    if settings.weights != "stripped":  # those are written with the graph, for the device to read
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.LazyTensor) and tensor.nbytes >= INLINE_BYTES:
                converted[name] = np.frombuffer(tensor.tobytes(), np.uint8)
                value.const_value = ir.ExternalTensor(
                    "converted", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
                )
    types = {value.dtype for value in model.graph.initializers.values()}
    oldest = OLDEST_FLOAT8 if ir.DataType.FLOAT8E4M3FN in types else OLDEST_FLOAT32
    return Lowered(ir.to_proto(model).SerializeToString(), converted, oldest)
