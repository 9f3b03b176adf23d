"""Running a float graph in little memory, for comparing and calibrating models of any size.

Weights stay mapped in the checkpoint's files; each is cast to float32 just before the layer that needs it and freed
after. What it costs is the time of the casts and of ONNX Runtime's optimisations, which would hold every weight in
float32, some of them twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from runtime.bundle.manifest import Artifact, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Availability, CompileOptions, Engine, Options, Slot
from runtime.errors import EngineError

BATCH: Final = "batch"
"""The dim along which rows do not depend on each other."""


def lean_session(model: ir.Model) -> ort.InferenceSession:
    """A session on a graph whose large weights are external tensors: unoptimised, so that constants stay mapped."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    ordered = _weights_first(model)
    if folder := _gather(ordered):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return ort.InferenceSession(ir.to_proto(ordered).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _gather(model: ir.Model) -> str:
    """Make the paths of external weights relative to one folder, which ONNX Runtime wants, and return it; empty where
    there are none.
    """
    initializers = model.graph.initializers.values()
    external = [(value, one) for value in initializers if isinstance(one := value.const_value, ir.ExternalTensor)]
    if not external:
        return ""
    folder = os.path.commonpath([one.base_dir for _, one in external])
    for value, one in external:
        path = os.path.relpath(one.path, folder)
        value.const_value = ir.ExternalTensor(
            path, one.offset, one.nbytes, one.dtype, shape=ir.Shape(one.shape.numpy()), name=one.name, base_dir=folder
        )
    return folder


def rows_of(inputs: Mapping[str, Array], session: ort.InferenceSession) -> list[dict[str, Array]]:
    """The inputs of each row of a batch: attention over a large picture holds gigabytes for every row that runs."""
    batched = {each.name for each in session.get_inputs() if each.shape and each.shape[0] == BATCH}
    count = max((len(array) for name, array in inputs.items() if name in batched), default=1)
    return [
        {name: array[row : row + 1] if name in batched else array for name, array in inputs.items()}
        for row in range(count)
    ]


def _weights_first(model: ir.Model) -> ir.Model:
    """The same graph with what is made of weights alone at its head.

    ONNX Runtime orders nodes by depth-first search from the outputs and, where a node has several inputs, visits the
    later ones of the file first: a Cast or Transpose of a weight runs just before its user only if it stands in front
    of everything else.
    """
    ordered = model.clone()
    constant = set(ordered.graph.initializers.values())
    nodes = []
    for node in ordered.graph:
        if all(value is None or value in constant for value in node.inputs):
            constant.update(node.outputs)
            nodes.append(node)
    ordered.graph.remove(nodes)
    ordered.graph.insert_before(ordered.graph[0], nodes)
    return ordered


class LeanEngine(Engine):
    """A canonical float graph as an engine for pipelines. States are arrays that each call gives back."""

    target = "lean"
    rank = 99
    device = "onnxruntime:CPUExecutionProvider, unoptimised"

    def __init__(self, submodel: Submodel, model: ir.Model) -> None:
        self.submodel = submodel
        self._session: Any = lean_session(model)
        self._slots: WeakKeyDictionary[Slot, dict[str, Array]] = WeakKeyDictionary()

    @classmethod
    def available(cls) -> Availability:
        return Availability(True, (cls.device,), version=ort.__version__)

    @classmethod
    def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
        raise EngineError("the lean engine compiles nothing: it is made from a graph in memory")

    @classmethod
    def load(cls, submodel: Submodel, root: Path, options: Options) -> Engine:
        return cls(submodel, ir.load(root / submodel.graph))

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        signature = self.submodel.signature
        names = [tensor.name for tensor in signature.graph_outputs]
        past = self._slots.get(slot or Slot(), {}) if signature.states else {}
        if signature.states and not past:
            batch = len(next(iter(inputs.values())))
            empty = signature.decoder.lengths(past=0, sequence=0, batch=batch)
            past = {s.past.name: np.zeros(s.past.shape(empty), s.past.dtype) for s in signature.states}
        try:
            if signature.states:
                results = dict(zip(names, self._session.run(names, {**inputs, **past}), strict=True))
            else:
                every = [self._session.run(names, row) for row in rows_of(inputs, self._session)]
                results = {
                    name: np.concatenate(rows) for name, rows in zip(names, zip(*every, strict=True), strict=True)
                }
        except Exception as error:  # the SDK raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime could not run {self.submodel.name}: {error}") from None
        if signature.states and slot is not None:
            self._slots[slot] = {s.past.name: results[s.present.name] for s in signature.states}
        return {tensor.name: results[tensor.name] for tensor in signature.outputs}

    def copy(self, slot: Slot, to: Slot) -> None:
        if slot in self._slots:
            self._slots[to] = self._slots[slot]  # a run replaces these arrays, and writes into none

    def trim(self, slot: Slot, length: int) -> None:
        if slot in self._slots:
            axes = {state.past.name: state.axis for state in self.submodel.signature.states}
            self._slots[slot] = {
                name: array.take(range(length), axes[name]) for name, array in self._slots[slot].items()
            }

    def close(self) -> None:
        self._slots.clear()
        self._session = None
