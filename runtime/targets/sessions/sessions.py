"""Sessions of ONNX Runtime: their provider, fixed lengths, and a check that the provider runs all nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from runtime.bundle.manifest import LARGEST_GRAPH
from runtime.errors import EngineError
from runtime.files import read_regular
from runtime.optional import require
from runtime.targets.lowering.nested import Stored, int8_name
from runtime.targets.sessions.stored import SessionPlan, read_weights

CPU: Final = "CPUExecutionProvider"
DISABLED: Final = ["QDQPropagationTransformer"]
"""It inserts uint8 zero points into symmetric int8 graphs, which ONNX Runtime then refuses (seen in 1.31)."""
ACCURACY: Final = "session.qdq_matmulnbits_accuracy_level"
"""The precision of layers with quantized weights: "4" rounds their inputs to 8 bits with a scale for each block; "0" is
float32.
"""
FOLDER: Final = "session.model_external_initializers_file_folder_path"
RECORD: Final = "session.record_ep_graph_assignment_info"
NO_FALLBACK: Final = "session.disable_cpu_ep_fallback"
SHAPE_OPERATORS: Final = frozenset(
    "Add And Cast Concat ConstantOfShape Div Equal Expand Gather Greater GreaterOrEqual Identity Less LessOrEqual Max "
    "Min Mod Mul Not "
    "Range ReduceProd ReduceSum Reshape Shape Size Slice Squeeze Sub Unsqueeze Where".split()
)
"""Operators that compute lengths. ONNX Runtime keeps such nodes on the CPU on purpose, since their results are read
there.
"""


@dataclass(frozen=True)
class Device:
    """The device of sessions: the provider, its settings, and ONNX Runtime's name of its memory."""

    provider: str
    memory: str = "cpu"
    index: int = 0
    options: Mapping[str, str] = field(default_factory=dict)


def sdk() -> Any:
    """The package. Raises MissingDependency."""
    return require("onnxruntime", "onnxruntime")


def open_session(
    graph: Path,
    weights: Path,
    device: Device,
    *,
    threads: int = 0,
    entries: Mapping[str, str] | None = None,
    fixed: Mapping[str, int] | None = None,
    converted: Mapping[str, Any] | None = None,
    level: str = "ORT_ENABLE_ALL",
    skipped: Sequence[str] = (),
) -> Any:
    """A session of `graph`. Its weights lie in the folder `weights`, except for those in `converted`, which must
    outlive the session.

    `entries` are ONNX Runtime's own session settings, `fixed` lengths by the name of their dim, `level` its
    optimization level and `skipped` optimizers to leave out. Raises EngineError.
    """
    package = sdk()
    settings = package.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    settings.graph_optimization_level = getattr(package.GraphOptimizationLevel, level)
    if device.provider == "DmlExecutionProvider":  # as its documentation demands
        settings.enable_mem_pattern = False
        settings.execution_mode = package.ExecutionMode.ORT_SEQUENTIAL
    for key, value in ({FOLDER: str(weights)} | dict(entries or {})).items():
        settings.add_session_config_entry(key, value)
    for name, length in (fixed or {}).items():
        settings.add_free_dimension_override_by_name(name, length)
    if converted:
        settings.add_external_initializers(list(converted), list(converted.values()))
    try:
        providers = [(device.provider, dict(device.options))] + ([CPU] if device.provider != CPU else [])
        return package.InferenceSession(
            read_regular(graph, LARGEST_GRAPH), settings, providers=providers, disabled_optimizers=[*DISABLED, *skipped]
        )
    except Exception as error:  # the SDK raises a dozen unrelated classes
        raise EngineError(f"ONNX Runtime could not compile {graph}: {error}") from None


def values_of(path: Path) -> dict[str, Any]:
    """The tensors of a weights file (`stored`) as ONNX Runtime's values, mapped. Raises EngineError."""
    make = sdk().OrtValue.ortvalue_from_numpy_with_onnx_type
    found = {}
    for name, weight in read_weights(path).items():
        raw = np.frombuffer(weight.data, np.float32 if weight.code == 1 else np.uint16)
        found[name] = make(raw.reshape(weight.shape), weight.code)
    return found


def nested_values(plan: SessionPlan, weights: Path) -> dict[str, Any]:
    """The int8 weights of a plan that are made from nested ones in this file, as ONNX Runtime's values. Raises
    EngineError.
    """
    if not plan.nested:
        return {}
    make, stored = sdk().OrtValue.ortvalue_from_numpy, Stored(weights)
    return {int8_name(name): make(stored.int8(name, shape)) for name, shape in plan.nested.items()}


def elsewhere(session: Any, provider: str) -> Counter[str]:
    """The number of nodes of each operator that run on another provider. The session must be opened with RECORD "1"."""
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != provider:
            found.update(f"{node.domain + '.' if node.domain else ''}{node.op_type}" for node in part.get_nodes())
    return found


def listed(nodes: Counter[str]) -> str:
    """Operators with their number of nodes, the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in nodes.most_common(5)) + (
        " and others" if len(nodes) > 5 else ""
    )
