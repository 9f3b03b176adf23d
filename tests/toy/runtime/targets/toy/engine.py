"""A toy target: ONNX Runtime by another name."""

from __future__ import annotations

from runtime.targets.onnxruntime.engine import ONNXRuntime


class Toy(ONNXRuntime):
    target = "toy"
    rank = 99
