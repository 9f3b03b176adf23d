"""Rows of two sides, figure by figure: by how much they differ, and whether the difference is real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.table import Table

from profiles.compare.bootstrap import LEAST, Ratio, ratio
from profiles.rows import Row
from runtime.errors import InvalidInput

CONFIDENCE: Final = 0.95
"""With which all intervals of a comparison hold together (Bonferroni): of many figures, none differs by chance."""
WHAT: Final = ("source", "quant", "target", "threads")
"""Fields that rows of one figure share, each only where a side has several values of it: int8 is compared with int4."""


@dataclass(frozen=True)
class Verdict:
    """One figure of both sides. `ratio` is None where there are too few measurements."""

    first: Row
    second: Row
    paired: bool
    ratio: Ratio | None

    @property
    def name(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in sorted(self.first.settings.items()))
        return f"{self.first.metric} ({settings})" if settings else self.first.metric

    def __str__(self) -> str:
        """The verdict in a sentence."""
        one, other = self.first.spread, self.second.spread
        if self.ratio is None:
            times = other.median / one.median if one.median else float("nan")
            return (
                f"{self.name}: B is {times:.3g} x A, of {min(one.repetitions, other.repetitions)} measurements: too "
                f"few to say whether that is real, expected {LEAST}"
            )
        found = self.ratio
        interval = f"B is {found.value:.3f} x A (interval {found.lower:.3f} to {found.upper:.3f})"
        if not found.differs:
            return f"{self.name}: {interval}: no difference is shown"
        better = (found.value > 1) is more_is_better(self.first.unit)
        return f"{self.name}: {interval}: the difference is real, B is {'better' if better else 'worse'}"


def more_is_better(unit: str) -> bool:
    """Of rates and scores more is better; of seconds, bytes, joules and refused requests less."""
    return "/" in unit or unit == "%"


def verdicts(first: Sequence[Row], second: Sequence[Row]) -> list[Verdict]:
    """A verdict on every figure that both sides have, from the newest row of each. Raises InvalidInput where they have
    none in common.
    """
    fields = [name for name in WHAT if _several(first, name) or _several(second, name)]
    mine, others = _newest(first, fields), _newest(second, fields)
    common = [key for key in mine if key in others]
    if not common:
        raise InvalidInput("B", f"has no figure in common with A: {_metrics(first)} beside {_metrics(second)}")
    level = 1 - (1 - CONFIDENCE) / len(common)
    return [_verdict(mine[key], others[key], level) for key in common]


def _several(rows: Iterable[Row], name: str) -> bool:
    return len({getattr(row, name) for row in rows}) > 1


def _newest(rows: Iterable[Row], fields: Sequence[str]) -> Mapping[object, Row]:
    """The newest row of each figure: what it says and of what."""
    key: Callable[[Row], object] = lambda row: (  # noqa: E731
        row.metric,
        row.unit,
        tuple(sorted(row.settings.items())),
        *(getattr(row, name) for name in fields),
    )
    return {key(row): row for row in sorted(rows, key=lambda row: row.date)}


def _metrics(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(row.metric for row in rows)) or "nothing"


def _verdict(first: Row, second: Row, level: float) -> Verdict:
    paired = bool(first.run) and first.run == second.run and len(first.values) == len(second.values)
    enough = min(len(first.values), len(second.values)) >= LEAST and min(*first.values, *second.values) > 0
    return Verdict(first, second, paired, ratio(first.values, second.values, paired, level) if enough else None)


def notes(found: Sequence[Verdict]) -> list[str]:
    """What a reader of the verdicts must know besides."""
    pairs = [(one.first, one.second) for one in found]
    said = []
    if any(not _same_machine(first, second) for first, second in pairs):
        said.append("A and B are of different machines: these ratios compare machines too")
    if any(not row.values for pair in pairs for row in pair):
        said.append(
            "rows without their single measurements, which older versions stored: measure again with `enginecast bench`"
        )
    if not all(one.paired for one in found):
        said.append(
            "not measured in turns: a drift of the machine between A and B counts as a difference; "
            "`enginecast bench compare BUNDLE BUNDLE` measures in turns"
        )
    return said


def _same_machine(first: Row, second: Row) -> bool:
    if first.fingerprint is None or second.fingerprint is None:
        return first.cpu == second.cpu
    return first.fingerprint.alike(second.fingerprint)


def table(found: Sequence[Verdict]) -> Table:
    """The verdicts for reading."""
    shown = Table("figure", "A", "B", "n", "B / A", "interval", "verdict")
    for one in found:
        first, second, unit = one.first.spread, one.second.spread, one.first.unit
        interval = "" if one.ratio is None else f"{one.ratio.lower:.3f}..{one.ratio.upper:.3f}"
        shown.add_row(
            one.name,
            f"{first.median:.4g} {unit}",
            f"{second.median:.4g} {unit}",
            f"{first.repetitions}, {second.repetitions}",
            f"{second.median / first.median:.3f}" if first.median else "",
            interval,
            "too few" if one.ratio is None else "differs" if one.ratio.differs else "no difference shown",
        )
    return shown
