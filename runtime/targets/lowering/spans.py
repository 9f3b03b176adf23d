"""What 8 bits span with a zero point: for tensors that lie mostly on one side of zero, and targets that have such.

The canonical graph is symmetric, since TensorRT takes nothing else. There, a tensor of values from -0.28 to 4, such as
SiLU's, uses 55 % of the codes; 256 codes from -0.28 to 4 make its noise 5 dB less. The form is affine quantization
(Jacob et al. 2017, arXiv 1712.05877).
"""

from __future__ import annotations

from typing import Final, NamedTuple

CODES: Final = 256


class Affine(NamedTuple):
    """A value is about step * (code - zero), codes being 0 to 255."""

    step: float
    zero: int

    @property
    def low(self) -> float:
        """The value of the least code."""
        return -self.step * self.zero

    @property
    def high(self) -> float:
        """The value of the largest code."""
        return self.step * (CODES - 1 - self.zero)


def affine(low: float, high: float) -> Affine:
    """256 codes that span low <= 0 to high >= 0, not both 0, moved so that one of them is zero itself: padding must not
    become noise.
    """
    step = (high - low) / (CODES - 1)
    return Affine(step, round(-low / step))
