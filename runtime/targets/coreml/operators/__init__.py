"""The translation of each operator of the canonical graph to MIL, one function for each."""

from __future__ import annotations

from runtime.targets.coreml.operators import attention, elementwise, normalizations, products, quantization, shapes
from runtime.targets.coreml.operators.base import OPERATORS

__all__ = ["OPERATORS", "attention", "elementwise", "normalizations", "products", "quantization", "shapes"]
