"""Compute once what the rows of a classifier-free guidance batch have in common.

Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) runs the denoiser on the same latents with two
prompts. Until a layer reads the prompt, both rows are the same: in Stable Diffusion 1.5 that includes one of the five
attentions over all positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.bundle.signature import BATCH, Array, Dim, Signature, Tensor
from runtime.optional import require


def guided(signature: Signature, inputs: Mapping[str, Array]) -> bool:
    """Whether the rows of these inputs differ only in conditions."""
    shared = [inputs[tensor.name] for tensor in _batched(signature) if not tensor.condition]
    return has_conditions(signature) and all(
        len(array) > 1 and bool((array[1:] == array[:1]).all()) for array in shared
    )


def has_conditions(signature: Signature) -> bool:
    """Whether some of the inputs are conditions, in which the rows of a classifier-free guidance batch differ, and some
    are not.
    """
    return len({tensor.condition for tensor in _batched(signature)}) == 2


def _batched(signature: Signature) -> list[Tensor]:
    """The inputs that have rows: others, such as the matrices of adapters, are the same for all."""
    first = ((tensor, tensor.dims[0]) for tensor in signature.inputs if tensor.dims)
    return [tensor for tensor, dim in first if isinstance(dim, Dim) and dim.name == BATCH.name]


def share_rows(model: Any, signature: Signature) -> None:
    """Let a model of fixed shapes compute values that depend on no condition for the first row only, and repeat them
    where a condition is read.
    """
    ops = require("openvino.opset15", "openvino")
    alike, different = _split(model, signature)
    inputs = [model.input(tensor.name) for tensor in _batched(signature) if not tensor.condition]
    (count,) = {int(port.get_shape()[0]) for port in inputs}
    repeated: dict[str, Any] = {}
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in different:
            continue
        for port in node.inputs():
            source = port.get_source_output()
            name, shape = source.get_node().get_friendly_name(), source.get_partial_shape()
            if name not in alike or not len(shape) or shape[0].get_length() != count:
                continue
            key = f"{name}:{source.get_index()}"
            if key not in repeated:
                form = ops.constant([count] + [1] * (len(shape) - 1))
                repeated[key] = ops.broadcast(source, form, broadcast_spec="BIDIRECTIONAL").output(0)
            port.replace_source_output(repeated[key])
    zero, one = ops.constant([0]), ops.constant([1])
    for source in inputs:
        readers = [port for port in source.get_target_inputs() if port.get_node().get_type_name() != "ShapeOf"]
        first = ops.slice(source, zero, one, one, zero)
        for port in readers:
            port.replace_source_output(first.output(0))
    model.validate_nodes_and_infer_types()


def _split(model: Any, signature: Signature) -> tuple[set[str], set[str]]:
    """The names of nodes whose rows are alike, and of those whose rows differ. Values made of shapes or constants are
    in neither set.
    """
    conditions = {
        model.input(tensor.name).get_node().get_friendly_name(): tensor.condition for tensor in _batched(signature)
    }
    alike, different = set[str](), set[str]()
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        sources = {port.get_source_output().get_node().get_friendly_name() for port in node.inputs()}
        if conditions.get(name) or sources & different or (kind == "Result" and sources & alike):
            different.add(name)
        elif name in conditions or (sources & alike and kind != "ShapeOf"):
            alike.add(name)
    return alike, different
