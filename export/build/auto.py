"""`--quant auto`: the smallest or fastest assignment of forms to layers that keeps the model's work within a drop.

What each form of each layer does to its submodel's output is measured one by one (`calibration.search.sensitivity`), or
estimated from a few runs where the submodel is big (`calibration.search.approximate`); exchange rates between cost and
noise give the assignments worth having (`calibration.search.search`); of these, one for each signal to noise ratio in
LEVELS is tried on the whole model, and the cheapest within the drop is taken. The drop is in points of the score for a
model whose work a program can score, else in dB below the recipe int8.

Every figure is kept in the cache once it is known: a search that was stopped goes on, and the same search is not done
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field

from calibration.quantize.plan import LayerPlan, plan
from calibration.quantize.recipes import INT4_EVERYWHERE, RECIPES
from calibration.quantize.tuning import Tuning
from calibration.search.approximate import approximate
from calibration.search.paired import Paired
from calibration.search.search import Assignment, Goal, cheapest, frontier
from calibration.search.sensitivity import Alternative, Board, Measure, snr_db
from export.build.staging import cache_folder, cached, key_of
from runtime.bundle.manifest import Frozen
from runtime.bundle.signature import Array
from runtime.errors import QualityError

LEVELS: Final = (44.0, 40.0, 36.0, 32.0, 28.0, 24.0, 20.0)
"""Signal to noise ratios, in dB, that every submodel's output keeps at least."""
CALLS: Final = 6
"""Captured calls on which noise is measured."""
MEASURED_BYTES: Final = 128 << 20
"""Weights of a submodel, in the checkpoint, up to which each form of each layer is measured; beyond, noises are
approximated.
"""
CASES: Final = 500
"""Most cases that an assignment is tried on; none of them is held out: held-out cases show how good the choice was."""
BATCH: Final = 100
"""Cases after which is looked whether more are needed."""
SURE: Final = 0.98
"""How sure it must be that an assignment is within the drop, or is not, to try no more cases.

With a look after each of up to 5 batches this takes one that is just beyond the drop in 4 to 5 % of all searches
(simulated, decision 6).
"""
FILE: Final = "search.json"

Method = Literal["measured", "approximated"]
Plans = Mapping[str, Sequence[LayerPlan]]
Judge = Callable[[Plans | None, int], Generator[bool, None, None]]
"""Whether the model quantized so, or with None the float model, does each case right, from the case of that number
(counted from 0) on.
"""


class Point(Frozen):
    """A whole model that was tried. `cost` is a share of the float model's; `snr_db` the least of its submodels';
    `drop` is in the unit of the search.

    Of a drop in points: the `cases` both models did, how many points more or less the drop may be with 5 % each
    (`resolution`), and how sure it is that the drop is within what was allowed (0 to 1).
    """

    level: float
    cost: float = Field(ge=0)
    snr_db: float
    drop: float
    layers: dict[str, int]
    """How many layers take each form."""
    cases: int = 0
    resolution: float | None = None
    sure: float | None = None


class Explored(Frozen):
    """How the noises of one submodel's layers were found, and in how many runs."""

    method: Method
    runs: int


class Found(Frozen):
    """The points tried, in that order, and which was taken. `unit` is that of the drop: "points" or "dB"."""

    goal: Goal
    unit: str
    max_drop: float
    points: tuple[Point, ...]
    chosen: int
    submodels: dict[str, Explored] = Field(default_factory=dict)

    @property
    def claim(self) -> str:
        """What the evidence says of the one that was taken, in words."""
        point = self.points[self.chosen]
        if point.sure is None or point.resolution is None:
            return f"{point.drop:+.1f} dB below int8, on {CALLS} captured calls of each submodel at most"
        known = f"{point.drop:+.1f} points on {point.cases} cases, which tell {point.resolution:.1f} points apart"
        doubt = "" if point.sure >= SURE else "; NOT certain: allow more with --max-drop, or take it as the likeliest"
        return f"{known}: within {self.max_drop:g} with {100 * point.sure:.0f} % confidence{doubt}"


@dataclass(frozen=True)
class Submodel:
    """The assignments worth having of one submodel, the signal to noise ratio of its recipe int8, and how noises were
    found.
    """

    assignments: Sequence[Assignment]
    int8_db: float
    how: Explored

    @classmethod
    def explore(
        cls,
        graph: ir.Model,
        activations: bool,
        tuning: Tuning,
        samples: Sequence[Mapping[str, Array]],
        goal: Goal,
        nbytes: int,
        key: str,
    ) -> Submodel:
        """Explore the folded graph, whose weights are `nbytes` in the checkpoint. `activations` says whether int8 may
        cover activations.

        `key` identifies everything given but the goal: what was kept under it is not measured again. Raises
        InvalidInput without samples.
        """

        def measure(path: Path) -> None:
            found = _explore(
                graph, activations, tuning, samples, goal, nbytes, f"explore-{key_of(key, nbytes > MEASURED_BYTES)}"
            )
            path.write_text(json.dumps(found.record()))

        return cls.of_record(
            json.loads(cached(key_of("explored", key, nbytes > MEASURED_BYTES, goal), ".json", measure).read_bytes())
        )

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "assignments": [asdict(found) for found in self.assignments],
            "int8_db": self.int8_db,
            "how": self.how.model_dump(),
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Submodel:
        """What `record` gave."""
        assignments = [
            Assignment(**(one | {"plans": tuple(LayerPlan(**planned) for planned in one["plans"])}))
            for one in record["assignments"]
        ]
        return cls(assignments, record["int8_db"], Explored(**record["how"]))


def _explore(
    graph: ir.Model,
    activations: bool,
    tuning: Tuning,
    samples: Sequence[Mapping[str, Array]],
    goal: Goal,
    nbytes: int,
    folder: str,
) -> Submodel:
    """`folder`, in the cache, keeps each figure as it is found."""
    weights = plan(graph, RECIPES["int8-weight"])
    forms = [weights, plan(graph, INT4_EVERYWHERE)]
    int8: Sequence[LayerPlan] = weights
    if activations:
        int8 = tuning.plan(graph, RECIPES["int8"])
        forms.insert(0, [replace(form, reason="") for form in plan(graph, RECIPES["int8"])])
    calls = np.linspace(0, len(samples) - 1, min(CALLS, len(samples))).astype(int)
    board = Board(graph, forms, tuning, [samples[index] for index in calls])
    floats = [replace(form, weight_type="float", block=0, reason="costs more than it saves") for form in weights]
    small = nbytes <= MEASURED_BYTES
    (cache_folder() / folder).mkdir(parents=True, exist_ok=True)
    runs = 0

    def kept(name: str, measure: Measure) -> NDArray[np.float64]:
        nonlocal runs
        runs += name.startswith(("layer-", "probe-"))
        found = cached(f"{folder}/{name}", ".npy", lambda path: np.save(path, measure(), allow_pickle=False))
        return np.asarray(np.load(found, allow_pickle=False), np.float64)

    def noises() -> NDArray[np.float64]:
        """Of every form of every layer, and in the end how many runs that took."""
        found = board.alternatives(kept) if small else approximate(graph, board, tuning, kept)
        return np.array([form.noise for forms in found for form in forms] + [runs])

    *values, took = kept("noises", noises).tolist()
    for part in [*(cache_folder() / folder).glob("layer-*"), *(cache_folder() / folder).glob("probe-*")]:
        part.unlink(missing_ok=True)
    left = iter(values)
    alternatives = [[Alternative(form, next(left)) for _, form in forms] for forms in board.choices()]
    noise = kept("int8", lambda: np.array(board.noise(board.choice(int8))))
    return Submodel(
        frontier(board, floats, goal, alternatives, kept),
        snr_db(float(noise)),
        Explored(method="measured" if small else "approximated", runs=int(took)),
    )


class Exam:
    """The cases that whole models are compared on. What each model did is kept under `key`, which identifies the model
    and the judge.
    """

    def __init__(self, judge: Judge, key: str, cases: int = CASES) -> None:
        self._judge, self._cases, self._folder = judge, cases, f"search-{key}"
        self._running: dict[str, Generator[bool, None, None]] = {}
        (cache_folder() / self._folder).mkdir(parents=True, exist_ok=True)

    def compare(self, plans: Plans, most: float) -> Paired:
        """As many cases as it takes to be sure whether the drop is at most so many points, if enough there are."""
        found = Paired()
        for first in range(0, self._cases, BATCH):
            found = found.seen(self._batch(None, first), self._batch(plans, first))
            if not 1 - SURE < found.sure(most) < SURE:
                break
        self._stop(_name(plans))
        return found

    def close(self) -> None:
        """Let go of the models that still run."""
        for name in list(self._running):
            self._stop(name)

    def _batch(self, plans: Plans | None, first: int) -> list[bool]:
        def measure(path: Path) -> None:
            running = self._running.get(_name(plans)) or self._running.setdefault(
                _name(plans), self._judge(plans, first)
            )
            path.write_text(json.dumps(list(islice(running, min(BATCH, self._cases - first)))))

        found: list[bool] = json.loads(cached(f"{self._folder}/{_name(plans)}-{first}", ".json", measure).read_bytes())
        return found

    def _stop(self, name: str) -> None:
        if name in self._running:
            self._running.pop(name).close()


def _name(plans: Plans | None) -> str:
    return (
        key_of({name: [asdict(planned) for planned in layers] for name, layers in plans.items()})[:16]
        if plans is not None
        else "float"
    )


def search(submodels: Mapping[str, Submodel], goal: Goal, max_drop: float, exam: Exam | None) -> tuple[Plans, Found]:
    """The plans of the cheapest assignment within `max_drop`, and all that was tried: one a level, cheapest first.

    With an exam the drop is in points, and the first that is surely within is taken; if none is, the one most surely
    so. Without, it is in dB. Raises QualityError when even the best drops more.
    """
    candidates: list[tuple[Point, Plans]] = []
    for level in LEVELS:
        chosen = {name: cheapest(found.assignments, level) for name, found in submodels.items()}
        plans: Plans = {name: assignment.plans for name, assignment in chosen.items()}
        if all(plans != other for _, other in candidates):
            drop = max(submodels[name].int8_db - assignment.snr_db for name, assignment in chosen.items())
            candidates.append((_point(level, chosen, drop), plans))
    candidates.sort(key=lambda one: one[0].cost)
    points: list[Point] = []
    for point, plans in candidates:
        if exam is not None:
            seen = exam.compare(plans, max_drop)
            figures = {
                "drop": seen.drop,
                "cases": seen.cases,
                "resolution": seen.resolution,
                "sure": seen.sure(max_drop),
            }
            point = point.model_copy(update=figures)
        points.append(point)
        if exam is not None and point.sure is not None and point.sure >= SURE:
            break
    within = [number for number, point in enumerate(points) if point.drop <= max_drop]
    if not within:
        best = min(point.drop for point in points)
        raise QualityError(
            f"no assignment stays within a drop of {max_drop:g}: the best one tried drops {best:.1f}. Allow more with "
            "--max-drop"
        )
    taken = max(within, key=lambda number: (points[number].sure or 0.0, -points[number].cost))
    how = {name: found.how for name, found in submodels.items()}
    unit = "points" if exam is not None else "dB"
    return candidates[taken][1], Found(
        goal=goal, unit=unit, max_drop=max_drop, points=tuple(points), chosen=taken, submodels=how
    )


def _point(level: float, chosen: Mapping[str, Assignment], drop: float) -> Point:
    sizes = {name: sum(planned.elements for planned in assignment.plans) for name, assignment in chosen.items()}
    cost = sum(assignment.cost * sizes[name] for name, assignment in chosen.items()) / (sum(sizes.values()) or 1)
    layers: dict[str, int] = {}
    for assignment in chosen.values():
        for planned in assignment.plans:
            form = "W8A8" if planned.activation else planned.weight_type
            layers[form] = layers.get(form, 0) + 1
    return Point(
        level=level,
        cost=cost,
        snr_db=min(a.snr_db for a in chosen.values()),
        drop=drop,
        layers=dict(sorted(layers.items())),
    )
