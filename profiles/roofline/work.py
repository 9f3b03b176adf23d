"""How many operations a call of a submodel has: its canonical graph is run once in ONNX Runtime, which records the
shapes of every node; products, convolutions and attention are counted, a multiplication and an addition each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from runtime.bundle.signature import Array
from runtime.optional import require

Shape = Sequence[int]
Count = Callable[[Sequence[Shape], Shape], int]
"""Operations of a node, from the shapes of its inputs and of its first output."""


def _matmul(inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * prod(output) * inputs[0][-1]


def _gemm(inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * prod(output) * (prod(inputs[0]) // output[0])


def _conv(inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * prod(output) * prod(inputs[1][1:])


def _attention(inputs: Sequence[Shape], output: Shape) -> int:
    """Queries by keys, and what comes of it by values; heads may be merged into the last axis."""
    return 2 * inputs[1][-2] * (prod(inputs[0]) + prod(output))


COUNTS: Final[Mapping[str, Count]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "FusedMatMul": _matmul,
    "Conv": _conv,
    "FusedConv": _conv,
    "Attention": _attention,
}
"""By operator; names of ONNX Runtime's own fusions besides those of ONNX."""


def operations(graph: Path, inputs: Mapping[str, Array]) -> int:
    """Of one call with these inputs. Raises what ONNX Runtime does for a graph that it cannot run."""
    ort: Any = require("onnxruntime", "openvino")
    with TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_text())
    return sum(_operations(event.get("args", {})) for event in events if event.get("cat") == "Node")


def _operations(node: Mapping[str, Any]) -> int:
    count = COUNTS.get(node.get("op_name", ""))
    if count is None or not node.get("output_type_shape"):
        return 0
    shapes = [[next(iter(one.values())) for one in node[name]] for name in ("input_type_shape", "output_type_shape")]
    return count(shapes[0], shapes[1][0])
