"""ONNX Runtime on the CPU. KV caches are buffers shared by past and present of GroupQueryAttention, grown by doubling.

The compiled artifact is a small graph without weights: it reads those of the canonical graph. Only decoders differ from the canonical form.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from runtime.bundle import Artifact, Submodel
from runtime.engine import Availability, Engine, Options
from runtime.errors import EngineUnavailable, MissingDependency
from runtime.files import written
from runtime.optional import require
from runtime.ort.attention import CONTRIB, with_grouped_cache
from runtime.ort.engine import SessionEngine, folder_of
from runtime.ort.sessions import ACCURACY, CPU, Device, open_session, sdk
from runtime.ort.stored import Plan, load_graph

PROVIDER: Final = CPU
TRIAL: Final = {"session.disable_prepacking": "1", "session.use_device_allocator_for_initializers": "1"}
"""What proves that a graph is accepted without copying its weights, together with the level below and weights left unfolded."""


class ONNXRuntime(SessionEngine):
    """A session on the CPU provider."""

    target = "onnxruntime"
    rank = 30

    @classmethod
    def available(cls) -> Availability:
        try:
            return Availability(True, (PROVIDER,), version=sdk().__version__)
        except MissingDependency as error:
            return Availability(False, reason=str(error))

    @classmethod
    def compile(cls, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        lowered, files = graph, tuple[str, ...]()
        if submodel.signature.states:
            model = load_graph(graph)
            with_grouped_cache(model, submodel.signature)
            output.mkdir(parents=True, exist_ok=True)
            lowered, files = output / f"{submodel.name}.onnx", (f"{submodel.name}.onnx",)
            with written(lowered) as file:
                file.write(require("onnx_ir", "export").to_proto(model).SerializeToString())
        open_session(lowered, graph.parent, Device(PROVIDER), entries=TRIAL, level="ORT_ENABLE_EXTENDED", skipped=["ConstantFolding"])
        return Artifact(target=cls.target, submodel=submodel.name, files=files, seconds=time.perf_counter() - start)

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        if options.device not in ("", PROVIDER, "CPU"):
            raise EngineUnavailable(f"ONNX Runtime has no device '{options.device}' here: expected {PROVIDER}")
        canonical = root / submodel.graph
        states = bool(submodel.signature.states)
        graph = folder_of(root, cls.target, options.compiled) / f"{submodel.name}.onnx" if states else canonical
        entries = {ACCURACY: "4" if submodel.dynamic else "0"} | dict(options.settings)
        device = Device(PROVIDER)

        def opened(shape: Any, step: bool) -> Any:
            options.verify()
            return open_session(graph, canonical.parent, device, threads=options.threads, entries=entries)

        rounds = submodel.dynamic and entries[ACCURACY] == "4" and _processor_rounds()
        name = f"onnxruntime:{PROVIDER}" + (" with dynamic 8-bit activations" if rounds else "")
        return cls(submodel, name, device, Plan(graph=graph.name, cache="grouped" if states else ""), opened, vary=True)


@cache
def _processor_rounds() -> bool:
    """Try one product of either number of bits, whose result tells: next to 127, an input of 0.25 is lost in 8 bits."""
    values = np.array([[127] + [0.25] * 31], np.float32)
    sessions = [sdk().InferenceSession(_product_of_ones(bits), providers=[PROVIDER]) for bits in (4, 8)]
    return all(float(session.run(None, {"x": values})[0][0, 0]) != float(values.sum()) for session in sessions)


def _product_of_ones(bits: int) -> bytes:
    """The ONNX model y [1, 1] = MatMulNBits(x [1, 32]) with weights of 1, written field by field (numbers: onnx.proto of ONNX 1.23).

    Serving machines have no library that writes ONNX.
    """

    def tensor_type(length: int) -> bytes:
        shape = b"".join(_field(1, _field(1, dim)) for dim in (1, length))
        return _field(1, _field(1, 1) + _field(2, shape))

    def initializer(name: str, dtype: int, dims: tuple[int, ...], data: bytes) -> bytes:
        return b"".join(_field(1, dim) for dim in dims) + _field(2, dtype) + _field(8, name) + _field(9, data)

    numbers = {"K": 32, "N": 1, "bits": bits, "block_size": 32, "accuracy_level": 4}
    codes = bytes([0x99] * 16 if bits == 4 else [129] * 32)  # the zero point is in the middle: 8 and 128
    node = b"".join(_field(1, name) for name in ("x", "codes", "scales")) + _field(2, "y") + _field(4, "MatMulNBits") + _field(7, CONTRIB)
    node += b"".join(_field(5, _field(1, name) + _field(3, number) + _field(20, 2)) for name, number in numbers.items())
    graph = _field(1, node) + _field(2, "product")
    graph += _field(5, initializer("codes", 2, (1, 1, len(codes)), codes))
    graph += _field(5, initializer("scales", 1, (1, 1), np.ones(1, "<f4").tobytes()))
    graph += _field(11, _field(1, "x") + _field(2, tensor_type(32))) + _field(12, _field(1, "y") + _field(2, tensor_type(1)))
    opsets = _field(8, _field(1, "") + _field(2, 21)) + _field(8, _field(1, CONTRIB) + _field(2, 1))
    return _field(1, 10) + _field(7, graph) + opsets


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protocol buffer message: its number and an integer, or a text, bytes or message with its length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the highest bit set."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)
