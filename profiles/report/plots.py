"""The plots of a report, drawn by matplotlib (extra plots) as PNG, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from profiles.compare.verdicts import more_is_better
from profiles.report.figures import Bar, Ceiling, Line, Point, Trade
from runtime.optional import require

EXTRA: Final = "plots"
WIDTH: Final = 9.0
"""Inches."""
DPI: Final = 120
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of Okabe and Ito: told apart with every kind of colour vision, on light and dark."""
MARKERS: Final = "osD^vP"
PANELS: Final = 2
"""Bar charts in a row, where their labels have at most `LONG` characters."""
LONG: Final = 22


@dataclass(frozen=True)
class Style:
    """The colours of a page."""

    back: str
    ink: str
    soft: str
    line: str


LIGHT: Final = Style("#ffffff", "#1b1f24", "#5b6570", "#dfe3e8")
DARK: Final = Style("#1d2127", "#e7eaee", "#9aa5b1", "#343b44")


@dataclass(frozen=True)
class Plot:
    """A drawn plot: its name for files, its title, and PNG files for light and dark pages."""

    name: str
    title: str
    light: bytes
    dark: bytes


def plot(name: str, title: str, draw: Callable[[Any, Style], None], height: float) -> Plot:
    """Draw on a figure of so many inches, once for each style. Raises MissingDependency without matplotlib."""
    light, dark = (_png(draw, style, height) for style in (LIGHT, DARK))
    return Plot(name, title, light, dark)


def _png(draw: Callable[[Any, Style], None], style: Style, height: float) -> bytes:
    matplotlib, figures = require("matplotlib", EXTRA), require("matplotlib.figure", EXTRA)
    settings = {
        "figure.facecolor": style.back, "axes.facecolor": style.back, "savefig.facecolor": style.back,
        "text.color": style.ink, "axes.labelcolor": style.soft, "axes.edgecolor": style.line,
        "xtick.color": style.soft, "ytick.color": style.ink, "grid.color": style.line, "legend.edgecolor": style.line,
        "legend.facecolor": style.back, "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = figures.Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure, style)
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=DPI, metadata={"Software": None})
    return written.getvalue()


def colours(targets: Sequence[str]) -> dict[str, str]:
    """A colour for each target, the same in every plot of a page."""
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(sorted(set(targets)))}


def latency(
    panels: Mapping[str, Sequence[Bar]], colour: Mapping[str, str]
) -> tuple[Callable[[Any, Style], None], float]:
    """A bar chart of each metric, with quartiles, and its height in inches."""
    longest = max(len(bar.label) for bars in panels.values() for bar in bars)
    columns = min(len(panels), PANELS if longest <= LONG else 1)
    rows = -(-len(panels) // columns)
    tallest = [max(len(bars) for bars in list(panels.values())[row * columns :][:columns]) for row in range(rows)]

    def draw(figure: Any, style: Style) -> None:
        ratios = [1.2 + each for each in tallest]
        axes = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios).ravel()
        for axis, (title, bars) in zip(axes, panels.items(), strict=False):
            _bars(axis, title, bars, colour, style)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()

    return draw, sum(0.75 + 0.3 * each for each in tallest)


def _bars(axis: Any, title: str, bars: Sequence[Bar], colour: Mapping[str, str], style: Style) -> None:
    places = range(len(bars))
    medians = [bar.spread.median for bar in bars]
    errors = [
        [bar.spread.median - bar.spread.lower for bar in bars],
        [bar.spread.upper - bar.spread.median for bar in bars],
    ]
    axis.barh(
        places, medians, xerr=errors, color=[colour[bar.target] for bar in bars], height=0.68, ecolor=style.soft,
        error_kw={"elinewidth": 1},
    )  # fmt: skip
    for place, bar in zip(places, bars, strict=True):
        share = "" if bar.reached is None else f"  ({bar.reached:.0%})"
        axis.annotate(
            f"{bar.spread.median:.4g}{share}", (bar.spread.upper, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, color=style.soft,
        )  # fmt: skip
    axis.set_yticks(list(places), [bar.label for bar in bars])
    axis.invert_yaxis()
    axis.set_title(title)
    axis.set_xlim(0, 1.45 * max(bar.spread.upper for bar in bars) or 1)
    axis.tick_params(axis="y", length=0)
    axis.locator_params(axis="x", nbins=5)


def scaling(unit: str, lines: Sequence[Line], across: str, colour: Mapping[str, str]) -> Callable[[Any, Style], None]:
    """Rates against a number of requests."""

    def draw(figure: Any, style: Style) -> None:
        axis = figure.subplots()
        for number, line in enumerate(lines):
            across_, rates = zip(*line.points, strict=True)
            axis.plot(
                across_, rates, marker=MARKERS[number % len(MARKERS)], color=colour[line.target], label=line.label
            )
        axis.set_xscale("log", base=2)
        ticks = sorted({place for line in lines for place, _ in line.points})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(across)
        axis.set_ylabel(unit)
        axis.grid(axis="y")
        axis.legend()

    return draw


def trading(trades: Sequence[Trade], colour: Mapping[str, str]) -> Callable[[Any, Style], None]:
    """Quality against size; the area is the speed, beside the fastest one."""
    fastest = max((_pace(trade) for trade in trades), default=0.0)

    precisions = list(dict.fromkeys(trade.label.partition(" on ")[0] for trade in trades))

    def draw(figure: Any, style: Style) -> None:
        axis = figure.subplots()
        for trade in sorted(trades, key=_pace, reverse=True):  # the smallest on top
            pace = _pace(trade)
            speed = "not timed" if trade.speed is None else f"{trade.speed:.3g} {trade.unit}"
            axis.scatter(
                1e3 * trade.size, trade.quality, s=500 * pace / fastest if pace else 40,
                c=colour[trade.target] if pace else "none", edgecolors=style.ink, alpha=0.75,
                marker=MARKERS[precisions.index(trade.label.partition(" on ")[0]) % len(MARKERS)],
                label=f"{trade.label}: {1e3 * trade.size:.3g} MB, {trade.quality:.1f} %, {speed}",
            )  # fmt: skip
        axis.set_xlabel("size in MB")
        axis.set_ylabel("right in the exam, %")
        axis.margins(0.25)
        axis.grid()
        axis.set_axisbelow(True)
        for handle in figure.legend(loc="outside lower center", ncols=2, fontsize=8).legend_handles:
            handle.set_sizes([40])

    return draw


def _pace(trade: Trade) -> float:
    """Speed as more is better; 0 where it was not measured."""
    if not trade.speed:
        return 0.0
    return trade.speed if more_is_better(trade.unit) else 1 / trade.speed


def rooflines(
    bandwidth: float, ceilings: Sequence[Ceiling], points: Sequence[Point], colour: Mapping[str, str]
) -> Callable[[Any, Style], None]:
    """Rates against operations for each byte read: the limits of memory and arithmetic, and the calls below them."""
    highest = max(ceiling.rate for ceiling in ceilings)
    least = min([point.intensity for point in points] + [0.5 * highest / bandwidth]) / 4
    most = max([point.intensity for point in points] + [highest / bandwidth]) * 8

    def draw(figure: Any, style: Style) -> None:
        axis = figure.subplots()
        for number, ceiling in enumerate(sorted(ceilings, key=lambda one: one.rate)):
            knee, hue = ceiling.rate / bandwidth, colour[ceiling.target]
            axis.plot([least, knee, most], [least * bandwidth, ceiling.rate, ceiling.rate], color=hue)
            axis.annotate(
                f"{ceiling.label} {ceiling.rate:.0f}", (most / 8 ** (number % 2), ceiling.rate), xytext=(-4, 3),
                textcoords="offset points", ha="right", fontsize=9, color=hue,
            )  # fmt: skip
        for number, point in enumerate(points):
            share = "" if point.reached is None else f" ({point.reached:.0%})"
            axis.plot(
                point.intensity, point.rate, linestyle="", marker=MARKERS[number % len(MARKERS)],
                color=colour[point.target], markeredgecolor=style.ink, label=f"{point.label}{share}",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(f"operations for each byte of weights (memory: {bandwidth:.1f} GB/s)")
        axis.set_ylabel("billion operations a second")
        axis.grid(which="major")
        if points:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)

    return draw
