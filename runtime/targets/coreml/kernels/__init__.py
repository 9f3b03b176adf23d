"""What MIL's operations compute, in numpy: each takes its inputs by name, floats in 32 bits, and returns what it gives.

Written from the operations' documentation (coremltools 9.0, iOS 15 to 18), not from the code that folds constants in
coremltools.
"""

from __future__ import annotations

from runtime.targets.coreml.kernels import elementwise, products, quantization, shapes
from runtime.targets.coreml.kernels.base import KERNELS
from runtime.targets.coreml.kernels.shapes import MOVES

__all__ = ["KERNELS", "MOVES", "elementwise", "products", "quantization", "shapes"]
