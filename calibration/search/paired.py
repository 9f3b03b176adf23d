"""What the same cases, done by two models, tell about how much worse the second is: by those alone on which they
differ.

Most cases say nothing about the drop: both models do them, or neither does. Lost and gained ones decide, so the drop is
known far better than either score. Its error is that of Bonett and Price 2012 (Journal of Educational and Behavioral
Statistics 37, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data"), which
holds for few cases and few differences too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import erf, sqrt
from typing import Final

ONE_SIDED: Final = 1.645
"""Standard errors that a normal variable exceeds in 5 % of all trials."""


@dataclass(frozen=True)
class Paired:
    """Cases seen, those that only the first model did right, and those that only the second did."""

    cases: int = 0
    lost: int = 0
    gained: int = 0

    def seen(self, first: Iterable[bool], second: Iterable[bool]) -> Paired:
        """With these cases, in the same order, added."""
        pairs = list(zip(first, second, strict=True))
        lost, gained = (sum(1 for pair in pairs if pair == wanted) for wanted in ((True, False), (False, True)))
        return Paired(self.cases + len(pairs), self.lost + lost, self.gained + gained)

    @property
    def drop(self) -> float:
        """By how many points (percent of the cases) the second model did worse."""
        return 100 * (self.lost - self.gained) / self.cases if self.cases else 0.0

    @property
    def resolution(self) -> float:
        """Points by which the drop may be larger than `drop`, and by which it may be smaller, with 5 % each."""
        return ONE_SIDED * self._estimate[1]

    def sure(self, most: float) -> float:
        """How sure it is that the drop is `most` points or less, 0 to 1."""
        center, error = self._estimate
        return 0.5 * (1 + erf((most - center) / error / sqrt(2)))

    @property
    def _estimate(self) -> tuple[float, float]:
        """Center and standard error of the drop, in points."""
        cases = self.cases + 2
        lost, gained = (self.lost + 1) / cases, (self.gained + 1) / cases
        return 100 * (lost - gained), 100 * sqrt((lost + gained - (lost - gained) ** 2) / cases)
