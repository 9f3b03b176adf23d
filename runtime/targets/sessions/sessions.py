"""Sessions of ONNX Runtime: on which provider, with which lengths fixed, and whether that provider does all
the work.
"""

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
"""What layers with quantized weights compute in: "4" rounds their inputs to 8 bits, a block of theirs to a scale; "0"
is float32.
"""
FOLDER: Final = "session.model_external_initializers_file_folder_path"
RECORD: Final = "session.record_ep_graph_assignment_info"
NO_FALLBACK: Final = "session.disable_cpu_ep_fallback"
SHAPE_OPERATORS: Final = frozenset(
    "Add And Cast Concat ConstantOfShape Div Equal Expand Gather Greater GreaterOrEqual Identity Less LessOrEqual Max "
    "Min Mod Mul Not "
    "Range ReduceProd ReduceSum Reshape Shape Size Slice Squeeze Sub Unsqueeze Where".split()
)
"""What lengths are computed with. ONNX Runtime keeps such nodes on the CPU on purpose: their results are read there."""


@dataclass(frozen=True)
class Device:
    """Where sessions run: the provider, its settings, and what ONNX Runtime calls the memory that it computes in."""

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
    """A session over `graph`, whose weights lie in the folder `weights` but for those in `converted`, which must
    outlive the session.

    `entries` are ONNX Runtime's own settings of a session, `fixed` lengths by the name of their dim, `level` and
    `skipped` what of its optimization is done and left out. Raises EngineError.
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
    """The tensors of a weights file (`stored`) as ONNX Runtime holds them, mapped. Raises EngineError."""
    make = sdk().OrtValue.ortvalue_from_numpy_with_onnx_type
    found = {}
    for name, weight in read_weights(path).items():
        raw = np.frombuffer(weight.data, np.float32 if weight.code == 1 else np.uint16)
        found[name] = make(raw.reshape(weight.shape), weight.code)
    return found


def nested_values(plan: SessionPlan, weights: Path) -> dict[str, Any]:
    """The int8 weights of a plan that are made of nested ones, which lie in this file, as ONNX Runtime holds them.
    Raises EngineError.
    """
    if not plan.nested:
        return {}
    make, stored = sdk().OrtValue.ortvalue_from_numpy, Stored(weights)
    return {int8_name(name): make(stored.int8(name, shape)) for name, shape in plan.nested.items()}


def elsewhere(session: Any, provider: str) -> Counter[str]:
    """How many nodes of each operator run on another provider than that one. The session must be opened with RECORD
    "1".
    """
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != provider:
            found.update(f"{node.domain + '.' if node.domain else ''}{node.op_type}" for node in part.get_nodes())
    return found


def listed(nodes: Counter[str]) -> str:
    """Operators and how many nodes each has, most first."""
    return ", ".join(f"{count} {name}" for name, count in nodes.most_common(5)) + (
        " and others" if len(nodes) > 5 else ""
    )
