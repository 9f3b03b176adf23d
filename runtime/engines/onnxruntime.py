"""ONNX Runtime on the CPU. KV caches are buffers shared by past and present of GroupQueryAttention, grown by doubling.

The compiled artifact is a small graph without weights: it reads those of the canonical graph. Only decoders differ from the canonical form.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np

from runtime.bundle import Artifact, Submodel
from runtime.engine import Availability, Engine, Options, Slot
from runtime.errors import EngineError, EngineUnavailable, MissingDependency
from runtime.optional import require
from runtime.signature import Array, Dim, Signature, Tensor

PROVIDER: Final = "CPUExecutionProvider"
CONTRIB: Final = "com.microsoft"
FIRST_CAPACITY: Final = 256
"""Positions that a slot's cache holds at first."""
DISABLED: Final = ["QDQPropagationTransformer"]
"""It inserts uint8 zero points into symmetric int8 graphs, which ONNX Runtime then refuses (seen in 1.31)."""
ACCURACY: Final = "session.qdq_matmulnbits_accuracy_level"
"""What layers with quantized weights compute in: "4" rounds their inputs to 8 bits, a block of theirs to a scale; "0" is float32."""


class ONNXRuntime(Engine):
    """An inference session on the CPU provider."""

    target = "onnxruntime"
    rank = 30

    def __init__(self, submodel: Submodel, session: Any) -> None:
        self.submodel = submodel
        asked = submodel.dynamic and session.get_session_options().get_session_config_entry(ACCURACY) == "4"
        self.device = f"onnxruntime:{PROVIDER}" + (" with dynamic 8-bit activations" if asked and _processor_rounds() else "")
        self._session = session
        self._outputs = [tensor.name for tensor in submodel.signature.outputs]
        self._slots: WeakKeyDictionary[Slot, _Cache] = WeakKeyDictionary()

    @classmethod
    def available(cls) -> Availability:
        try:
            sdk = require("onnxruntime", "onnxruntime")
        except MissingDependency as error:
            return Availability(False, reason=str(error))
        return Availability(True, (PROVIDER,), version=sdk.__version__)

    @classmethod
    def compile(cls, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        start = time.perf_counter()
        if not submodel.signature.states:
            _session(graph, graph.parent, submodel.dynamic, Options())
            return Artifact(target=cls.target, submodel=submodel.name, seconds=time.perf_counter() - start)
        output.mkdir(parents=True, exist_ok=True)
        lowered = output / f"{submodel.name}.onnx"
        _share_cache(graph, lowered, submodel.signature)
        _session(lowered, graph.parent, submodel.dynamic, Options())
        return Artifact(target=cls.target, submodel=submodel.name, files=(lowered.name,), seconds=time.perf_counter() - start)

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        if options.device not in ("", PROVIDER, "CPU"):
            raise EngineUnavailable(f"ONNX Runtime has no device '{options.device}' here: expected {PROVIDER}")
        canonical = root / submodel.graph
        lowered = root / "engines" / cls.target / f"{submodel.name}.onnx"
        graph = lowered if submodel.signature.states else canonical
        return cls(submodel, _session(graph, canonical.parent, submodel.dynamic, options))

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        try:
            if not self.submodel.signature.states:
                return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))
            return self._run_slot(inputs, slot or Slot())
        except EngineError:
            raise
        except Exception as error:  # the SDK raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime could not run {self.submodel.name}: {error}") from None

    def _run_slot(self, inputs: Mapping[str, Array], slot: Slot) -> dict[str, Array]:
        """Run on a slot's buffers. GroupQueryAttention continues several rows only one position at a time, and reads no padding."""
        if not inputs["attention_mask"].all():
            raise EngineError(f"ONNX Runtime could not run {self.submodel.name}: attention_mask has zeros, expected rows without padding")
        (batch, sequence), total = inputs["position_ids"].shape, inputs["attention_mask"].shape[1]
        cache = self._slots.setdefault(slot, _Cache(self.submodel.signature, batch))
        if batch != cache.batch:
            raise EngineError(f"ONNX Runtime could not run {self.submodel.name}: the slot holds {cache.batch} rows, this call has {batch}")
        buffers = cache.reserve(total)
        if batch == 1 or sequence in (1, total):
            return self._run_bound(inputs, buffers)
        outputs: dict[str, Array] = {}
        for position in range(sequence):
            now = {"sequence": slice(position, position + 1), "total": slice(total - sequence + position + 1)}
            outputs = self._run_bound(
                {tensor.name: _cut(tensor, inputs[tensor.name], now) for tensor in self.submodel.signature.inputs}, buffers
            )
        return outputs

    def _run_bound(self, inputs: Mapping[str, Array], buffers: Mapping[str, Any]) -> dict[str, Array]:
        """Bind past and present of each state to the same buffer, so that keys and values are written where they stay."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._outputs:
            binding.bind_output(name)
        for state in self.submodel.signature.states:
            binding.bind_ortvalue_input(state.past.name, buffers[state.past.name])
            binding.bind_ortvalue_output(state.present.name, buffers[state.past.name])
        self._session.run_with_iobinding(binding)
        results = binding.get_outputs()  # in the order they were bound
        # A view of a value dies with the value, so the caller gets copies.
        return {name: np.array(value.numpy()) for name, value in zip(self._outputs, results, strict=False)}

    def trim(self, slot: Slot, length: int) -> None:
        """The next call's mask says how much of the buffers is valid, so a slot that begins anew is all there is to forget."""
        if length == 0:
            self._slots.pop(slot, None)

    def close(self) -> None:
        self._slots.clear()
        self._session = None


class _Cache:
    """The buffers of one slot, [batch, heads, capacity, size] each."""

    def __init__(self, signature: Signature, batch: int) -> None:
        self.states = signature.states
        self.batch = batch
        self.capacity = 0
        self.values: dict[str, Any] = {}

    def reserve(self, length: int) -> dict[str, Any]:
        """Buffers that hold at least `length` positions, with what they held before."""
        if length > self.capacity:
            sdk = require("onnxruntime", "onnxruntime")
            self.capacity = max(FIRST_CAPACITY, 1 << (length - 1).bit_length())
            for state in self.states:
                name = state.past.name
                grown = np.zeros(state.past.shape({"batch": self.batch, "past": self.capacity}), state.past.dtype)
                if name in self.values:
                    held = self.values[name].numpy()
                    grown[:, :, : held.shape[2]] = held
                self.values[name] = sdk.OrtValue.ortvalue_from_numpy(grown)
        return self.values


def _cut(tensor: Tensor, array: Array, lengths: Mapping[str, slice]) -> Array:
    """The part of an array that lies within the given range of each varying dim."""
    return array[tuple(lengths.get(dim.name, slice(None)) if isinstance(dim, Dim) else slice(None) for dim in tensor.dims)]


def _session(graph: Path, weights: Path, dynamic: bool, options: Options) -> Any:
    sdk = require("onnxruntime", "onnxruntime")
    settings = sdk.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = 3
    entries = {"session.model_external_initializers_file_folder_path": str(weights), ACCURACY: "4" if dynamic else "0"}
    for key, value in (entries | dict(options.settings)).items():
        settings.add_session_config_entry(key, value)
    try:
        return sdk.InferenceSession(graph.read_bytes(), settings, providers=[PROVIDER], disabled_optimizers=DISABLED)
    except Exception as error:  # the SDK raises a dozen unrelated classes
        raise EngineError(f"ONNX Runtime could not compile {graph}: {error}") from None


@cache
def _processor_rounds() -> bool:
    """Try one product of either number of bits, whose result tells: next to 127, an input of 0.25 is lost in 8 bits."""
    sdk = require("onnxruntime", "onnxruntime")
    values = np.array([[127] + [0.25] * 31], np.float32)
    sessions = [sdk.InferenceSession(_product_of_ones(bits), providers=[PROVIDER]) for bits in (4, 8)]
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


def _share_cache(graph: Path, lowered: Path, signature: Signature) -> None:
    """Write the decoder's graph with each `Attention` as `GroupQueryAttention`, whose past and present may be the same buffer.

    It takes packed heads [batch, length, heads * size] and the number of valid positions instead of a mask, and is causal by itself.
    """
    ir = require("onnx_ir", "export")
    model = ir.load(graph)
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    lengths = _valid_lengths(ir, model)
    for node in nodes:
        query, key, value, _mask, past_key, past_value = node.inputs[:6]
        heads, grouped = query.shape[1], past_key.shape[1]
        packed = [_pack(ir, node, tensor) for tensor in (query, key, value)]
        attributes = {"num_heads": heads, "kv_num_heads": grouped, "scale": node.attributes["scale"].as_float()}
        fused = ir.node(
            "GroupQueryAttention", [*packed, past_key, past_value, *lengths], attributes, domain=CONTRIB, num_outputs=3, name=node.name
        )
        model.graph.insert_before(node, fused)
        for old, new in zip(node.outputs[1:3], fused.outputs[1:], strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        ir.convenience.replace_all_uses_with(node.outputs[0], _unpack(ir, node, fused.outputs[0], heads))
    model.graph.remove(nodes, safe=True)
    require("onnx_ir.passes.common", "export").RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[CONTRIB] = 1
    ir.save(model, lowered)


def _constant(ir: Any, model: Any, name: str, values: list[int]) -> Any:
    value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
    model.graph.register_initializer(value)
    return value


def _valid_lengths(ir: Any, model: Any) -> tuple[Any, Any]:
    """seqlens_k [batch] (the last valid position) and the total length, both int32, from the attention mask."""
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    one = _constant(ir, model, "seqlens.one", [1])
    count = ir.node("ReduceSum", [mask, one], {"keepdims": 0})
    last = ir.node("Sub", [count.outputs[0], one])
    seqlens = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32})
    total = ir.node("Shape", [mask], {"start": 1, "end": 2})
    scalar = ir.node("Squeeze", [total.outputs[0]])
    length = ir.node("Cast", [scalar.outputs[0]], {"to": ir.DataType.INT32})
    model.graph.insert_before(model.graph[0], [count, last, seqlens, total, scalar, length])
    return seqlens.outputs[0], length.outputs[0]


def _pack(ir: Any, before: Any, tensor: Any) -> Any:
    """[batch, heads, length, size] to [batch, length, heads * size]."""
    model = before.graph
    shape = ir.Value(name=f"{tensor.name}.packed_shape", const_value=ir.tensor(np.array([0, 0, -1], np.int64)))
    model.register_initializer(shape)
    moved = ir.node("Transpose", [tensor], {"perm": [0, 2, 1, 3]})
    packed = ir.node("Reshape", [moved.outputs[0], shape])
    model.insert_before(before, [moved, packed])
    return packed.outputs[0]


def _unpack(ir: Any, before: Any, tensor: Any, heads: int) -> Any:
    """[batch, length, heads * size] back to [batch, heads, length, size]."""
    model = before.graph
    shape = ir.Value(name=f"{before.name}.unpacked_shape", const_value=ir.tensor(np.array([0, 0, heads, -1], np.int64)))
    model.register_initializer(shape)
    split = ir.node("Reshape", [tensor, shape])
    moved = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]})
    model.insert_before(before, [split, moved])
    return moved.outputs[0]
