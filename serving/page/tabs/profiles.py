"""The tab of measured figures: rows of `enginecast bench` and `score`, as plots."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import gradio as gr

from runtime.placing.measured import Row, collect
from serving.page.parts import Updates

NONE: Final = "There are no figures here: `enginecast bench DIR --store` measures a bundle on this machine."


class Profiles:
    """The tab. `files` are files of rows, one JSON object a line."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._rows = collect(files).rows
        sources = sorted({row.source for row in self._rows})
        source = next(iter(sources), None)
        metrics = self._metrics(source)
        if not self._rows:
            gr.Markdown(NONE)
        with gr.Row():
            self.source = gr.Dropdown(sources, value=source, label="Model", elem_id="profiles-source")
            self.metric = gr.Dropdown(
                metrics, value=next(iter(metrics), None), label="Figure", elem_id="profiles-metric"
            )
        self.plot = gr.BarPlot(
            self._frame(self.source.value, self.metric.value), x="what", y="value", color="target", height=320,
            x_title="numbers on engine", y_title="value", x_label_angle=-30, elem_id="profiles-plot", sort="-y",
            tooltip=["what", "value", "cpu"], buttons=["fullscreen"],
        )  # fmt: skip

    def wire(self) -> None:
        """Say what happens when something is chosen."""
        self.source.change(self._source, self.source, [self.metric, self.plot], show_progress="hidden")
        self.metric.change(self._metric, [self.source, self.metric], self.plot, show_progress="hidden")

    def _metrics(self, source: str | None) -> list[str]:
        return sorted({label(row) for row in self._rows if row.source == source})

    def _source(self, source: str | None) -> Updates:
        metrics = self._metrics(source)
        first = next(iter(metrics), None)
        return {self.metric: gr.update(choices=metrics, value=first), self.plot: self._frame(source, first)}

    def _metric(self, source: str | None, metric: str | None) -> Any:
        return self._frame(source, metric)

    def _frame(self, source: str | None, metric: str | None) -> Any:
        import pandas

        return pandas.DataFrame(bars(self._rows, source, metric), columns=["what", "value", "target", "cpu"])


def label(row: Row) -> str:
    """The name of a figure, with its unit."""
    return f"{row.metric} ({row.unit})"


def bars(measured: Iterable[Row], source: str | None, metric: str | None) -> list[tuple[str, float, str, str]]:
    """The bars of a figure: numbers on an engine, the median of its rows, the engine, the processor."""
    found = defaultdict[tuple[str, str, str], list[float]](list)
    for row in measured:
        if row.source == source and label(row) == metric:
            program = "" if row.program.startswith("enginecast") else f"{row.program.split()[0]} "
            found[f"{program}{row.quant} on {row.target}", row.target, row.cpu].append(row.spread.median)
    return [(what, statistics.median(values), target, cpu) for (what, target, cpu), values in found.items()]
