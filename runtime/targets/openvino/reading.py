"""Reads the canonical graph in the form that is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.bundle.manifest import Submodel
from runtime.targets.openvino.devices import Where
from runtime.targets.openvino.fixed import Fixed
from runtime.targets.openvino.graph import (
    StoredGraph,
    halve_attention,
    keep_nf4,
    keep_tables,
    use_zero_points,
    vary_attention,
    widen,
)
from runtime.targets.openvino.sharing import share_rows


def read_graph(
    core: Any, submodel: Submodel, graph: StoredGraph, where: Where, values: Mapping[str, str], fixed: Fixed | None
) -> Any:
    """The graph in the form that is compiled, without its states."""
    model = core.read_model(graph.path)
    if submodel.precision.nested:
        widen(model, graph)
    keep_nf4(model, graph)
    if where.cpu:
        keep_tables(model)
    if values.get("zero_points") != "off":
        use_zero_points(model, submodel.activation_ranges)
    if values.get("attention") == "bfloat16":
        halve_attention(model, submodel.bfloat16)
    if fixed is not None:
        model.reshape({name: list(shape) for name, shape in fixed.shapes})
        vary_attention(model)
        if fixed.guided:
            share_rows(model, submodel.signature)
    return model
