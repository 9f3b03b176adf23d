"""MIL's operations in numpy: each function takes its inputs by name, computes floats in 32 bits, and returns its
outputs.

Written from the operations' documentation (coremltools 9.0, iOS 15 to 18), not from coremltools' constant folding.
"""

from __future__ import annotations

from runtime.targets.coreml.kernels import elementwise, products, quantization, shapes
from runtime.targets.coreml.kernels.base import KERNELS
from runtime.targets.coreml.kernels.shapes import MOVES

__all__ = ["KERNELS", "MOVES", "elementwise", "products", "quantization", "shapes"]
