"""Compiles a submodel for the device: for fixed calls where it needs them, decoders with caches in pages or states."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from runtime.bundle.manifest import Submodel
from runtime.engine import Options
from runtime.errors import EngineError
from runtime.placing.choices import Decision
from runtime.targets.openvino.blobs import kept
from runtime.targets.openvino.deciding import decisions_for
from runtime.targets.openvino.devices import Where
from runtime.targets.openvino.fixed import Fixed, fixed_first
from runtime.targets.openvino.graph import StoredGraph, keep_states
from runtime.targets.openvino.pages import fits, has_pages, use_pages
from runtime.targets.openvino.reading import read_graph
from runtime.targets.openvino.settings import (
    computes_half,
    processor_rounds,
    settings_for,
    shared_core,
    where_of,
)


class Made(NamedTuple):
    """A compiled model, its device for display, the type it computes in, what runs elsewhere, the decisions for this
    processor, and whether it is compiled for fixed shapes.
    """

    compiled: Any
    device: str
    computes: str
    fallbacks: tuple[str, ...]
    decisions: Mapping[str, Decision]
    fixed: bool


def compiled_for(
    submodel: Submodel,
    graph: StoredGraph,
    options: Options,
    fixed: Fixed | None = None,
    decisions: Mapping[str, Decision] | None = None,
) -> Made:
    """Compile for the device: for these calls, or for the usual ones where it needs fixed shapes. Choices that are
    still open are decided now.
    """
    core, where = shared_core(), where_of(options)
    if decisions is None:
        decisions = decisions_for(core, submodel, graph, where, options)
    values = {name: decision.value for name, decision in decisions.items()}
    fixed = fixed or fixed_first(submodel, where, values)
    try:
        with kept(where.cpu) as blobs:
            config = blobs | settings_for(core, submodel, where, options, values)
            model, compiled = _compiled(core, submodel, graph, where, config, values, fixed)
        name, fallbacks = f"openvino:{where.described(core, compiled)}", where.fallbacks(core, model)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"OpenVINO could not compile {graph.path}: {error}") from None
    half = where.cpu and computes_half(core, submodel, options, values)
    if half:
        name += " in bfloat16"
    elif values.get("attention") == "bfloat16":
        name += " with attention in bfloat16"
    if where.plain and fits(submodel.signature) and not has_pages(compiled):
        name += " with caches in states"  # the plugin has no attention over pages for this processor and these numbers
    if where.plain and _rounds(compiled):
        name += " with dynamic 8-bit activations"
    return Made(compiled, name, "bfloat16" if half else "float32", fallbacks, decisions, fixed is not None)


def _compiled(
    core: Any,
    submodel: Submodel,
    graph: StoredGraph,
    where: Where,
    config: Mapping[str, Any],
    values: Mapping[str, str],
    fixed: Fixed | None = None,
) -> tuple[Any, Any]:
    """The model that was read, and compiled.

    A decoder's cache is kept in pages where the plugin has an attention for the processor and the requested precision,
    else in states.
    """

    def read() -> Any:
        model = read_graph(core, submodel, graph, where, values, fixed)
        if submodel.signature.states:
            keep_states(model, submodel.signature)
        return model

    if where.plain and fits(submodel.signature):
        with suppress(RuntimeError):
            model = read()
            use_pages(model, submodel.signature)
            return model, core.compile_model(model, where.name, config)
    model = read()
    return model, core.compile_model(model, where.name, config)


def _rounds(compiled: Any) -> bool:
    """Whether inputs of layers are rounded to 8 bits: allowed, in a model with such layers, on a processor that can."""
    return (
        int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) > 0
        and _has_quantized_weights(compiled)
        and processor_rounds()
    )


def _has_quantized_weights(compiled: Any) -> bool:
    """Whether there are layers with quantized weights and float inputs. Other layers have int8 primitives."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    layers = [node for node in nodes if node["layerType"].astype(str) == "FullyConnected"]
    return any(
        node["runtimePrecision"].astype(str) in ("i4", "i8") and not node["primitiveType"].astype(str).endswith("_i8")
        for node in layers
    )
