"""Which form each layer should take, so that a submodel is as small or as fast as its output's noise allows.

Noises of layers add up while they are small, costs always do, so every assignment that is best at some exchange rate
between the two is found by letting each layer choose for itself: the lower convex hull of all assignments (Everett
1963, generalized Lagrange multipliers). What is found so is measured as a whole, since noises add up only nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from calibration.quantize.plan import LayerPlan
from calibration.search.sensitivity import Alternative, Board, Choice, Kept, measured, snr_db

Goal = Literal["size", "speed"]
GOALS: Final[tuple[Goal, ...]] = ("size", "speed")
RATES: Final = tuple(10.0 ** (power / 4) for power in range(-32, 33))
"""Exchange rates tried: shares of the whole cost that a noise of the whole power is worth."""
SCALE_BYTES: Final = {"float": 0.0, "int8": 0.0, "int4": 2.0}
"""Bytes of scales for each block of an int4 weight; those of int8, one a column, do not matter."""
WEIGHT_BYTES: Final = {"float": 2.0, "int8": 1.0, "int4": 0.5}
W8A8_PACE: Final = 0.5
"""Time of an int8 multiplication as a share of a float one, about that of AVX-512 VNNI; weights alone in int8 make none
faster.
"""


@dataclass(frozen=True)
class Assignment:
    """A plan for every layer. `cost` is a share of the float model's, `noise` the sum of its layers', `measured` that
    of the whole.
    """

    plans: tuple[LayerPlan, ...]
    cost: float
    noise: float
    measured: float

    @property
    def snr_db(self) -> float:
        return snr_db(self.measured)


def weight_bytes(planned: LayerPlan) -> float:
    """Bytes of a layer's stored weight, its float form being float16."""
    blocks = planned.elements / planned.block if planned.block else 0.0
    return planned.elements * WEIGHT_BYTES[planned.weight_type] + blocks * SCALE_BYTES[planned.weight_type]


def frontier(
    board: Board,
    floats: Sequence[LayerPlan],
    goal: Goal,
    alternatives: Sequence[Sequence[Alternative]],
    kept: Kept = measured,
) -> list[Assignment]:
    """The assignments worth having, least noise first. `floats` are the plans of the layers as they are."""
    work = board.work if goal == "speed" else [0] * len(floats)

    def cost(index: int) -> Callable[[LayerPlan], float]:
        if goal == "size":
            return weight_bytes
        return lambda planned: work[index] * (W8A8_PACE if planned.activation else 1.0)

    forms = [[Alternative(planned, 0.0), *others] for planned, others in zip(floats, alternatives, strict=True)]
    costs = [[cost(index)(form.plan) for form in choices] for index, choices in enumerate(forms)]
    whole = sum(layer[0] for layer in costs) or 1.0
    found: dict[tuple[int, ...], Assignment] = {}
    for rate in RATES:
        chosen = tuple(
            int(np.argmin([price / whole + rate * form.noise for price, form in zip(prices, choices, strict=True)]))
            for prices, choices in zip(costs, forms, strict=True)
        )
        if chosen not in found:
            picked = [choices[index] for choices, index in zip(forms, chosen, strict=True)]
            plans = tuple(form.plan for form in picked)
            price = sum(prices[index] for prices, index in zip(costs, chosen, strict=True)) / whole
            choice = board.choice(plans)
            noise = kept(f"assignment-{sha256(choice.tobytes()).hexdigest()[:16]}", partial(_measure, board, choice))
            found[chosen] = Assignment(plans, price, sum(form.noise for form in picked), float(noise))
    return _undominated(found.values())


def _measure(board: Board, choice: Choice) -> NDArray[np.float64]:
    return np.array(board.noise(choice))


def _undominated(assignments: Iterable[Assignment]) -> list[Assignment]:
    """Those that no other beats in both cost and measured noise, least noise first."""
    kept: list[Assignment] = []
    for assignment in sorted(assignments, key=lambda found: (found.measured, found.cost)):
        if not kept or assignment.cost < kept[-1].cost:
            kept.append(assignment)
    return kept


def cheapest(assignments: Sequence[Assignment], least_db: float) -> Assignment:
    """The cheapest assignment of at least that signal to noise ratio; the least noisy one if none reaches it."""
    good = [found for found in assignments if found.snr_db >= least_db]
    return min(good, key=lambda found: found.cost) if good else max(assignments, key=lambda found: found.snr_db)
