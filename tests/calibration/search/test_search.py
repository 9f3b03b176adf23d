"""The frontier against every assignment there is, on a board whose noises are known."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.quantize.plan import LayerPlan
from calibration.search.search import W8A8_PACE, Assignment, cheapest, frontier, weight_bytes
from calibration.search.sensitivity import Alternative, snr_db


class Known:
    """A board on which noises add up exactly."""

    def __init__(self, layers: list[list[Alternative]], macs: list[int]) -> None:
        self.found, self.work = layers, macs

    def choice(self, plans: Any) -> Any:
        return np.array(
            [
                next((number for number, form in enumerate(forms, 1) if form.plan == planned), 0)
                for planned, forms in zip(plans, self.found, strict=True)
            ]
        )

    def noise(self, choice: Any) -> float:
        return sum((forms[number - 1].noise for number, forms in zip(choice, self.found, strict=True) if number), 0.0)


def layer(index: int, kind: Any = "float", activation: bool = False) -> LayerPlan:
    return LayerPlan(
        f"n{index}", "MatMul", f"w{index}", 1024 * (index + 1), kind, 64 if kind == "int4" else 0, activation
    )


noises = st.floats(1e-6, 1e-1)


@settings(max_examples=30)
@given(st.lists(st.tuples(noises, noises), min_size=1, max_size=4), st.sampled_from(["size", "speed"]))
def test_nothing_beats_the_frontier(pairs: list[tuple[float, float]], goal: Any) -> None:
    found = [
        [Alternative(layer(index, "int8", activation=True), eight), Alternative(layer(index, "int4"), four)]
        for index, (eight, four) in enumerate(pairs)
    ]
    macs = [7 * (index + 3) for index in range(len(pairs))]
    floats = [layer(index) for index in range(len(pairs))]
    hull = frontier(Known(found, macs), floats, goal, found)  # type: ignore[arg-type]
    assert all(one.noise < two.noise and one.cost > two.cost for one, two in pairwise(hull))

    def price(plans: Any) -> float:
        if goal == "size":
            return sum(map(weight_bytes, plans)) / sum(map(weight_bytes, floats))
        return sum(
            work * (W8A8_PACE if planned.activation else 1) for work, planned in zip(macs, plans, strict=True)
        ) / sum(macs)

    for forms in product(
        *[[Alternative(planned, 0.0), *others] for planned, others in zip(floats, found, strict=True)]
    ):
        cost, noise = price([form.plan for form in forms]), sum(form.noise for form in forms)
        assert not any(cost < point.cost - 1e-9 and noise < point.noise - 1e-12 for point in hull)


def test_the_cheapest_that_is_good_enough() -> None:
    points = [Assignment((), cost, noise, noise) for cost, noise in ((1.0, 0.0), (0.6, 1e-4), (0.3, 1e-2))]
    assert [point.snr_db for point in points] == [200, 40, 20]
    assert [cheapest(points, db).cost for db in (50, 40, 20, 10)] == [1.0, 0.6, 0.3, 0.3]
    assert cheapest(points[1:], 60).cost == 0.6
    assert snr_db(float(np.float64(1e-3))) == 30.0


def test_what_is_known_of_an_assignment_is_not_measured() -> None:
    found = [[Alternative(layer(index, "int8"), 1e-4), Alternative(layer(index, "int4"), 1e-2)] for index in range(3)]
    floats = [layer(index) for index in range(3)]
    known: dict[str, Any] = {}
    board: Any = Known(found, [1, 1, 1])
    first = frontier(board, floats, "size", found, lambda name, measure: known.setdefault(name, measure()))
    assert len(known) >= len(first) > 1
    board.noise = None
    assert frontier(board, floats, "size", found, lambda name, measure: known[name]) == first
