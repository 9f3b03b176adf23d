"""nf4: codes of 4 bits that stand for 16 values between -1 and 1, and a scale for each block of inputs.

    weight = VALUES[code] * scale

ONNX has no such type. The canonical graph says it in standard operators, from initializers of these names:

    codes uint4 [K, N]          -> Cast -> Gather from the values -> Reshape [K / block, block, N]
    scales float16 [K / block, N] -> Cast -> Unsqueeze             -> Mul -> Reshape [K, N] -> MatMul

Targets with kernels for nf4 read the codes by their name. The others would restore a float weight of eight times their
size, so they are refused.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

CODES: Final = ".nf4"
"""The end of the name of the initializer that holds the codes."""
WEIGHT: Final = ".weight"
"""The end, after that name, of the name of the value that the layer reads."""
TABLE: Final = "nf4.values"
"""The initializer that holds the values."""
VALUES: Final[NDArray[np.float32]] = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""NormalFloat4, appendix E of Dettmers et al. 2023, arXiv 2305.14314."""
