"""From a torch module without weights to an ONNX graph without weights.

`torch.export` runs the module on meta tensors, so nothing of the model's size is ever allocated: graph building costs
the same for a 1 B and a 30 B model. Parameters become initializers that have a name, dtype and shape only;
`export.graph.weights` gives them their bytes.
"""

from __future__ import annotations

import ast
import inspect
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch import nn

from export.graph.rows import keep_axes
from export.graph.shortcuts import shortcuts
from runtime.bundle.signature import Dim, Signature

OPSET: Final = 23
FOLD_LIMIT: Final = 1024
"""Constants up to this many elements are folded: shapes and scalars, never weights."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built inside have meta parameters and real buffers: rotary frequencies and position ids are code, not
    weights.
    """
    with init_empty_weights(include_buffers=False):
        yield


def trace(module: nn.Module, signature: Signature) -> ir.Model:
    """The opset-23 graph of `module`, with inputs, outputs and dims named by the signature and parameters without
    values.

    `module` takes the signature's graph inputs in order and returns a tuple of its graph outputs.
    """
    lengths = signature.sample_lengths()
    inputs = tuple(
        torch.zeros(t.shape(lengths), dtype=getattr(torch, t.dtype), device="meta") for t in signature.graph_inputs
    )
    with _quiet(), shortcuts(), torch.no_grad():  # what a model does without gradients is no graph of its own then
        program = torch.onnx.export(
            module,
            inputs,
            dynamic_shapes=_dynamic_shapes(module, signature),
            input_names=[t.name for t in signature.graph_inputs],
            output_names=[t.name for t in signature.graph_outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model: ir.Model = program.model
        for name, _ in module.named_parameters(remove_duplicate=False):
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = None
        _simplify(model)
    _name_dims(model, signature)
    keep_axes(model)
    _settle_reshapes(model)
    _drop_casts(model)
    _name_nodes(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    return model


def _simplify(model: ir.Model) -> None:
    """Inline the exporter's functions, fold what is constant, drop what is unused or doubled.

    onnxscript's own `optimize` tries some fifty rewrites on every node, which takes a third of a trace; four of them
    apply to our models.
    """
    common.InlinePass()(model)
    optimizer.fold_constants(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    rewriter.rewrite(
        model,
        [rules.div_by_1_rule, rules.mul_by_1_rule, rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule],
    )
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)


def _dynamic_shapes(module: nn.Module, signature: Signature) -> tuple[Any, ...]:
    """Varying axes as torch.export wants them: those of the module's variable arguments are a tuple of their own."""
    axes = [
        {axis: torch.export.Dim.AUTO for axis, dim in enumerate(t.dims) if isinstance(dim, Dim)}
        for t in signature.graph_inputs
    ]
    parameters = inspect.signature(module.forward).parameters.values()
    variable = [index for index, each in enumerate(parameters) if each.kind is inspect.Parameter.VAR_POSITIONAL]
    if not variable or len(axes) <= variable[0]:
        return tuple(axes)
    return (*axes[: variable[0]], tuple(axes[variable[0] :]))


def _name_dims(model: ir.Model, signature: Signature) -> None:
    """Replace the tracer's symbols (s53) by the signature's dim names (batch), compound ones (s30*s91) included."""
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, signature.graph_inputs, strict=True):
        assert value.shape is not None
        for traced, dim in zip(value.shape, tensor.dims, strict=True):
            if isinstance(dim, Dim):
                assert isinstance(traced, ir.SymbolicDim), f"{tensor.name}: dim {dim.name} was specialised to {traced}"
                names.setdefault(str(traced.value), dim.name)
    symbol = re.compile(r"\bs\d+\b")
    for value in _values(model):
        if value.shape is not None:
            renamed = [
                symbol.sub(lambda m: names.get(m[0], m[0]), str(d.value))
                if isinstance(d, ir.SymbolicDim) and d.value
                else d
                for d in value.shape
            ]
            value.shape = ir.Shape(renamed)
    for values, tensors in (
        (model.graph.inputs, signature.graph_inputs),
        (model.graph.outputs, signature.graph_outputs),
    ):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape([dim.name if isinstance(dim, Dim) else dim for dim in tensor.dims])


def _drop_casts(model: ir.Model) -> None:
    """Leave out casts to the type that a value has, such as those of sizes."""
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is None or node.outputs[0].is_graph_output():
            continue
        if _type_of(source) == node.attributes["to"].as_int():
            ir.convenience.replace_all_uses_with(node.outputs[0], source)


def _type_of(value: ir.Value) -> ir.DataType | None:
    """The type of a value; a Concat that was simplified has none of its own, but that of its inputs."""
    maker = value.producer()
    if value.dtype is None and maker is not None and maker.op_type == "Concat" and maker.inputs[0] is not None:
        return maker.inputs[0].dtype
    return value.dtype


def _settle_reshapes(model: ir.Model) -> None:
    """Give each Reshape a constant shape where one says the same: 0 copies a dim, -1 stands for the only one left open.

    Without this every engine sees chains of Shape, Gather and Concat, and loses static dims such as the number of
    heads.
    """
    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or after is None:
            continue
        wanted = [
            d if isinstance(d, int) else 0 if i < len(before) and str(d) == str(before[i]) else -1
            for i, d in enumerate(after)
        ]
        if wanted.count(-1) > 1 or any(isinstance(d, int) and d == 0 for d in after):
            continue
        shape = ir.Value(
            name=f"{node.outputs[0].name}.shape", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(wanted)])
        )
        shape.const_value = ir.tensor(np.array(wanted, np.int64), name=shape.name)
        model.graph.register_initializer(shape)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _name_nodes(model: ir.Model) -> None:
    """Name nodes by the module they come from, as `down_blocks.0.resnets.0.conv1/Conv`: what a reader of the graph
    looks for.
    """
    seen: Counter[str] = Counter()
    for node in model.graph:
        scopes = [
            s
            for s in ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
            if "." in s or s == "model"
        ]
        scope = scopes[-1].removeprefix("model").removeprefix(".") if scopes else ""
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporter and optimizer print progress and warn of initializers without values, which is what we want here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
