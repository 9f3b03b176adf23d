"""`--quant auto`: the smallest or fastest assignment of forms to layers that keeps the model's work within a drop.

Each submodel's layers are switched one by one to see what each does to the output (`calibration.sensitivity`); exchange rates between
cost and noise give the assignments worth having (`calibration.search`); of these, one for each signal to noise ratio in LEVELS is tried
on the whole model, and the cheapest within the drop is taken. The drop is in points of the score for a model whose work a program can
score, else in dB below the recipe int8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir
from pydantic import Field

from calibration.quantize import RECIPES, LayerPlan, plan
from calibration.search import Assignment, Goal, cheapest, frontier
from calibration.sensitivity import Board, snr_db
from calibration.tuning import Tuning
from runtime.bundle import Frozen
from runtime.errors import QualityError
from runtime.signature import Array

LEVELS: Final = (44.0, 40.0, 36.0, 32.0, 28.0, 24.0, 20.0)
"""Signal to noise ratios, in dB, that every submodel's output keeps at least."""
CALLS: Final = 6
"""Captured calls on which noise is measured."""
CASES: Final = {"diffusion": 100, "chat": 200}
"""Cases that each assignment is tried on, by kind of pipeline; none of them is held out: those tell how good the choice was."""
INT4: Final = replace(RECIPES["int4"], worth=0)
FILE: Final = "search.json"

Plans = Mapping[str, Sequence[LayerPlan]]


class Point(Frozen):
    """A whole model that was tried. `cost` is a share of the float model's; `snr_db` the least of its submodels'; `drop` as asked for."""

    level: float
    cost: float = Field(ge=0)
    snr_db: float
    drop: float
    layers: dict[str, int]
    """How many layers take each form."""


class Found(Frozen):
    """The points tried, best quality first, and which was taken. `unit` is that of the drop: "points" or "dB"."""

    goal: Goal
    unit: str
    max_drop: float
    points: tuple[Point, ...]
    chosen: int


@dataclass
class Submodel:
    """One submodel's board and the assignments worth having. `activations` says whether int8 may cover activations."""

    board: Board
    int8: Sequence[LayerPlan]
    assignments: Sequence[Assignment]

    @classmethod
    def explore(cls, graph: ir.Model, activations: bool, tuning: Tuning, samples: Sequence[Mapping[str, Array]], goal: Goal) -> Submodel:
        """Measure every layer of the folded graph in every form. Raises InvalidInput without samples."""
        weights = plan(graph, RECIPES["int8-weight"])
        forms = [weights, plan(graph, INT4)]
        int8: Sequence[LayerPlan] = weights
        if activations:
            int8 = plan(graph, RECIPES["int8"], tuning.ranges)
            forms.insert(0, [replace(form, activation=_may_be_w8a8(form), reason="") for form in weights])
        board = Board(graph, forms, tuning, samples[:: max(1, len(samples) // CALLS)])
        floats = [replace(form, weight_type="float", block=0, reason="costs more than it saves") for form in weights]
        return cls(board, int8, frontier(board, floats, goal))


def _may_be_w8a8(form: LayerPlan) -> bool:
    return form.weight_type == "int8" and form.op != "Gemm"


def search(submodels: Mapping[str, Submodel], goal: Goal, max_drop: float, judge: Callable[[Plans], float] | None) -> tuple[Plans, Found]:
    """Try one assignment a level; the plans of the cheapest within `max_drop`, and all that was tried.

    `judge` gives the drop of a whole model in points; without one it is counted in dB. Raises QualityError when even the best drops more.
    """
    noise = {name: _snr(found, found.int8) for name, found in submodels.items()}
    points, plans = [], []
    for level in LEVELS:
        chosen = {name: cheapest(found.assignments, level) for name, found in submodels.items()}
        tried = {name: assignment.plans for name, assignment in chosen.items()}
        if tried in plans:
            continue
        drop = judge(tried) if judge else max(noise[name] - assignment.snr_db for name, assignment in chosen.items())
        points.append(_point(level, submodels, chosen, drop))
        plans.append(tried)
    within = [number for number, point in enumerate(points) if point.drop <= max_drop]
    if not within:
        best = min(points, key=lambda point: point.drop)
        raise QualityError(
            f"no assignment stays within a drop of {max_drop:g}: the best one tried drops {best.drop:.1f}. Allow more with --max-drop"
        )
    taken = min(within, key=lambda number: points[number].cost)
    found = Found(goal=goal, unit="points" if judge else "dB", max_drop=max_drop, points=tuple(points), chosen=taken)
    return plans[taken], found


def _snr(found: Submodel, plans: Sequence[LayerPlan]) -> float:
    return snr_db(found.board.noise(found.board.choice(plans)))


def _point(level: float, submodels: Mapping[str, Submodel], chosen: Mapping[str, Assignment], drop: float) -> Point:
    sizes = {name: sum(planned.elements for planned in assignment.plans) for name, assignment in chosen.items()}
    cost = sum(assignment.cost * sizes[name] for name, assignment in chosen.items()) / (sum(sizes.values()) or 1)
    layers: dict[str, int] = {}
    for assignment in chosen.values():
        for planned in assignment.plans:
            form = "W8A8" if planned.activation else planned.weight_type
            layers[form] = layers.get(form, 0) + 1
    return Point(level=level, cost=cost, snr_db=min(a.snr_db for a in chosen.values()), drop=drop, layers=dict(sorted(layers.items())))
