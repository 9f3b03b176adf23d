"""Changes to a model that OpenVINO has read, before it is compiled.

nested int4    becomes int8 weights
nf4            becomes a constant of that type, which stays compressed
tables         of embeddings in half precision are looked up in as they are stored
zero points    8 bits cover the bundle's activation ranges, where a symmetric range would waste codes
attention      in bfloat16, where the bundle allows it
queries        attention whose inputs are all constant gets one that is not
states         past and present of a decoder as variables of the model, updated in place

`sharing` computes what the rows of a classifier-free guidance batch have in common.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.signature import Signature
from runtime.optional import require
from runtime.targets.lowering import nested, nf4
from runtime.targets.lowering.activation_ranges import CODES, affine

BEAMS = "beam_idx"
"""Which row of the cache each row of the batch continues. OpenVINO recognises its in-place cache update only behind
this gather.
"""

KEEP = "keep_const_precision_0"
"""The mark of constants whose type OpenVINO's transformations leave as it is (KeepConstPrecision)."""


class StoredGraph:
    """A graph's file and its weights, mapped. What is compiled may read from them as long as it lives.

    Raises EngineError where the weights are read and cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def weights(self) -> nested.Stored:
        return nested.Stored(self.path.parent / nested.WEIGHTS)


def widen(model: Any, graph: StoredGraph) -> None:
    """Replace int4 weights that are nested in int8 (`runtime.targets.lowering.nested`) by int8 weights."""
    ops = require("openvino.opset15", "openvino")
    constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    for name, output in _restored(model, nested.CODES, nested.WEIGHT).items():
        shape = tuple(output.get_shape())
        codes = ops.constant(graph.weights.int8(name, shape), shared_memory=True)
        scales = constants[f"{name}{nested.SCALES}"].data.reshape(
            (1, -1) if len(shape) == 2 else (-1, *[1] * (len(shape) - 1))
        )
        weight = ops.multiply(ops.convert(codes, "f32"), ops.constant(scales.copy()))
        weight.set_friendly_name(output.get_node().get_friendly_name())
        for reader in list(output.get_target_inputs()):
            reader.replace_source_output(weight.output(0))


def keep_nf4(model: Any, graph: StoredGraph) -> None:
    """Replace what restores nf4 weights (`runtime.targets.lowering.nf4`) by constants of nf4 times their scales. The
    model reads from the graph's weights, which must live as long.
    """
    sdk, ops = require("openvino", "openvino"), require("openvino.opset15", "openvino")
    for name, output in _restored(model, nf4.CODES, nf4.WEIGHT).items():
        product = output.get_node().input_value(0)
        codes = sdk.Tensor(graph.weights.packed(name), product.get_shape(), sdk.Type.nf4)
        scales = product.get_node().input_value(1)
        weight = ops.multiply(ops.convert(ops.constant(codes, shared_memory=True), "f32"), scales)
        for reader in list(product.get_target_inputs()):
            reader.replace_source_output(weight.output(0))


def keep_tables(model: Any) -> None:
    """Let the plugin look up embeddings in half-precision tables as they are stored, and widen what is found. By itself
    it would widen whole tables: those of large vocabularies take as much memory as several layers.
    """
    for node in model.get_ops():
        table = node.input_value(0) if node.get_type_name() == "Gather" else None
        if table is not None and table.get_element_type().get_type_name() in ("f16", "bf16"):
            table.get_node().get_rt_info()[KEEP] = True


def _restored(model: Any, codes: str, weight: str) -> dict[str, Any]:
    """The weights that are restored from codes of these endings, by the names of the codes."""
    names = ((name, output) for node in model.get_ops() for output in node.outputs() for name in output.get_names())
    return {name.removesuffix(weight): output for name, output in names if name.endswith(f"{codes}{weight}")}


def use_zero_points(model: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Let the QuantizeLinear nodes of these names use 256 codes from `low` to `high` instead of a symmetric range.

    The SDK reads QuantizeLinear as FakeQuantize - Convert, DequantizeLinear as Convert - Subtract - Multiply. Raises
    ValueError where it does not: the graph and the ranges do not belong together.
    """
    ops = require("openvino.opset15", "openvino")
    stored = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Convert"}
    for name, (low, high) in ranges.items():
        chain = _followers(stored.get(name), "Convert", "Subtract", "Multiply")
        source = stored[name].input_value(0).get_node() if chain else None
        if source is None or source.get_type_name() != "FakeQuantize":
            raise ValueError(f"node '{name}' is not quantized as expected")
        form = affine(low, high)
        codes = ops.fake_quantize(
            source.input_value(0),
            np.float32(form.low),
            np.float32(form.high),
            np.float32(0),
            np.float32(CODES - 1),
            CODES,
        )
        widened = ops.convert(ops.convert(codes, "u8"), "f32")
        moved = ops.subtract(widened, ops.convert(ops.constant(np.array(form.zero, np.uint8)), "f32"))
        values = ops.multiply(moved, np.float32(form.step))
        values.set_friendly_name(chain[-1].get_friendly_name())
        for reader in list(chain[-1].output(0).get_target_inputs()):
            reader.replace_source_output(values.output(0))


def _followers(node: Any, *types: str) -> list[Any]:
    """The chain of nodes of these types that begins with the only reader of a node; empty where there is no such
    chain.
    """
    chain = []
    for name in types:
        readers = [] if node is None else [port.get_node() for port in node.output(0).get_target_inputs()]
        if len(readers) != 1 or readers[0].get_type_name() != name:
            return []
        chain.append(node := readers[0])
    return chain


def halve_attention(model: Any, names: Collection[str]) -> None:
    """Let the attentions of these names compute in bfloat16, between conversions from and to float32."""
    ops = require("openvino.opset15", "openvino")
    for node in model.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or node.get_friendly_name() not in names:
            continue
        for port in node.inputs():
            if port.get_element_type().get_type_name() == "f32":
                port.replace_source_output(ops.convert(port.get_source_output(), "bf16").output(0))
        readers = list(node.output(0).get_target_inputs())
        node.validate_and_infer_types()
        widened = ops.convert(node.output(0), "f32")
        for reader in readers:
            reader.replace_source_output(widened.output(0))
    model.validate_nodes_and_infer_types()


def vary_attention(model: Any) -> None:
    """Add 0 times an input to the queries of attentions that depend on no input, as the learned queries of a Q-Former.

    The CPU plugin of OpenVINO 2026.4 computes such a node once, when a request runs first, and lets other tensors use
    the memory of its result: later runs give other outputs.
    """
    ops = require("openvino.opset15", "openvino")
    varying = set[str]()
    for node in model.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        sources = [] if kind == "ShapeOf" else node.input_values()
        if kind == "Parameter" or any(source.get_node().get_friendly_name() in varying for source in sources):
            varying.add(name)
        elif kind == "ScaledDotProductAttention":
            given, query = model.input(0), node.input_value(0)
            axes = ops.constant(list(range(len(given.get_partial_shape()))))
            least = ops.convert_like(ops.reduce_min(given, axes), query)
            nothing = ops.multiply(least, ops.convert_like(ops.constant(np.float32(0)), query))
            node.input(0).replace_source_output(ops.add(query, nothing).output(0))
            varying.add(name)
    model.validate_nodes_and_infer_types()


def keep_states(model: Any, signature: Signature) -> None:
    """Turn past inputs and present outputs into states, in the form that the CPU plugin fuses into one attention with
    its cache.

    That form is ReadValue - Gather(beam_idx) - Concat - [expanded heads] - ScaledDotProductAttention, and Assign.
    """
    ops = require("openvino.opset15", "openvino")
    transformations = require("openvino._offline_transformations", "openvino")
    _expand_heads(model, ops)
    beams = ops.parameter([-1], np.int32, name=BEAMS)
    beams.output(0).get_tensor().set_names({BEAMS})
    model.add_parameters([beams])
    batch = ops.gather(ops.shape_of(model.input(signature.inputs[0].name)), ops.constant([0]), ops.constant(0))
    empty = {}
    for state in signature.states:
        past = model.input(state.past.name)
        users = list(past.get_target_inputs())
        gathered = ops.gather(past, beams, ops.constant(0))
        for user in users:
            user.replace_source_output(gathered.output(0))
        fixed = [ops.constant([length if isinstance(length, int) else 0]) for length in state.past.dims[1:]]
        empty[state.past.name] = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, *fixed], 0))
    transformations.apply_make_stateful_transformation(
        model, {state.past.name: state.present.name for state in signature.states}
    )
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":  # the id is both tensors' names, one after the other
            name = next(name for name in empty if node.get_variable_id().startswith(name + "present"))
            node.set_arguments([empty[name].output(0)])
    model.validate_nodes_and_infer_types()


def _expand_heads(model: Any, ops: Any) -> None:
    """Repeat grouped keys and values for every query head, in the form that the CPU plugin folds back into its
    attention.

    OpenVINO's attention has no grouped heads. Its ONNX reader repeats them with Tile, which the plugin does not
    recognise.
    """
    for node in model.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention":
            continue
        heads = node.input_value(0).get_partial_shape()[1].get_length()
        for index in (1, 2):
            source = _before_expansion(node.input_value(index))
            grouped, size = (source.get_partial_shape()[axis].get_length() for axis in (1, 3))
            if heads == grouped:
                continue
            shape = ops.shape_of(source)
            batch, length = (ops.gather(shape, ops.constant([axis]), ops.constant(0)) for axis in (0, 2))
            wide = ops.concat(
                [batch, ops.constant([grouped]), ops.constant([heads // grouped]), length, ops.constant([size])], 0
            )
            repeated = ops.broadcast(ops.unsqueeze(source, ops.constant(2)), wide, broadcast_spec="BIDIRECTIONAL")
            merged = ops.reshape(repeated, ops.constant([0, heads, -1, size]), special_zero=True)
            node.input(index).replace_source_output(merged.output(0))


def _before_expansion(output: Any) -> Any:
    """The grown keys or values, before they are repeated for every query head."""
    while output.get_node().get_type_name() in ("Reshape", "Tile", "Unsqueeze"):
        output = output.get_node().input_value(0)
    return output
