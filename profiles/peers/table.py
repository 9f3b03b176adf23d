"""The table of ours and peers: what each measured, the ratio to ours with its interval, peaks of memory, limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.table import Table

from profiles.compare.bootstrap import LEAST, Ratio, ratio
from profiles.compare.verdicts import CONFIDENCE, more_is_better
from profiles.peers.measuring import PEAK, RESIDENT, Party
from profiles.rows import Row

HEAD: Final = ("metric", "who", "median", "quartiles", "n", "limit", "of limit", "of ours", "interval", "ours is",
    "memory", "resident")  # fmt: skip
MEANING: Final = (
    "of ours: the median in parts of the first line's, which is ours, with a bootstrap interval of the ratio, all of "
    f"them together at {CONFIDENCE:.0%}; memory: the peak of anonymous memory while it was measured, resident: with "
    "pages mapped from files, in GB; limit: what reading the weights once allows, or the operations at the machine's "
    "rate"
)


def lines(parties: Sequence[Party], metrics: Sequence[str]) -> list[tuple[str, ...]]:
    """The cells below `HEAD`: metrics together, ours first."""
    tables = [list(_having(parties, metric)) for metric in metrics]
    level = 1 - (1 - CONFIDENCE) / max(1, sum(len(found) - 1 for found in tables if found))
    return [_line(party, row, found[0][1], level) for found in tables for party, row in found]


def _having(parties: Sequence[Party], metric: str) -> Iterator[tuple[Party, Row]]:
    return ((party, party.found[metric]) for party in parties if metric in party.found)


def _line(party: Party, row: Row, base: Row, level: float) -> tuple[str, ...]:
    spread = row.spread
    unit, scale = ("ms", 1e3) if row.unit == "s" and base.spread.median < 0.1 else (row.unit, 1.0)
    limit = "" if row.bound is None else f"{row.bound * scale:.4g}"
    return (
        row.metric,
        f"{row.program}, {row.target} {row.quant}",
        f"{spread.median * scale:.4g} {unit}",
        f"{spread.lower * scale:.4g}..{spread.upper * scale:.4g}",
        str(spread.repetitions),
        limit,
        "" if row.reached is None else f"{row.reached:.0%}",
        *_compared(row, base, level),
        *(_gigabytes(party, f"{name}{row.metric}") for name in (PEAK, RESIDENT)),
    )


def _compared(row: Row, base: Row, level: float) -> tuple[str, str, str]:
    """The ratio to ours, its interval, and whether ours is faster."""
    if row is base:
        return "1", "", ""
    if min(len(row.values), len(base.values)) < LEAST or min(*row.values, *base.values) <= 0:
        return f"{row.spread.median / base.spread.median:.3f}", "", "too few to say"
    found = ratio(base.values, row.values, len(row.values) == len(base.values), level)
    return f"{found.value:.3f}", f"{found.lower:.3f}..{found.upper:.3f}", _verdict(found, row.unit)


def _verdict(found: Ratio, unit: str) -> str:
    if not found.differs:
        return "no difference shown"
    return "slower" if (found.value > 1) is more_is_better(unit) else "faster"


def _gigabytes(party: Party, metric: str) -> str:
    return f"{party.found[metric].spread.median:.2f}" if metric in party.found else ""


def shown(cells: Sequence[tuple[str, ...]]) -> Table:
    """For a terminal."""
    table = Table(*HEAD)
    for line in cells:
        table.add_row(*line)
    return table


def markdown(title: str, notes: Sequence[str], cells: Sequence[tuple[str, ...]], parties: Sequence[Party]) -> str:
    """As a page: what was measured, the table, and who was left out."""
    head = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    rows = [HEAD, tuple("---" for _ in HEAD), *cells]
    failed = [f"- {line}" for line in failures(parties)]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*head, *body, "", f"{MEANING}.", *(["", "Left out:", "", *failed] if failed else []), ""])


def failures(parties: Sequence[Party]) -> list[str]:
    """A sentence on each that failed."""
    return [f"{party.name}: {' '.join(party.failure.split())}" for party in parties if party.failure]
