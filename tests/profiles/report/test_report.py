"""Reports: which rows they show, and how."""

from __future__ import annotations

import base64
import io
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from profiles import cli, rows
from profiles.report import figures, page, plots
from profiles.roofline.bounds import WEIGHTS
from profiles.roofline.rates import MACHINE
from profiles.rows import Row
from runtime.errors import InvalidInput, NotFound
from runtime.placing.fingerprint import here
from runtime.timing import Spread

DAY = datetime(2026, 1, 2, tzinfo=UTC)
SHAPE = {"sample": "2x4x8x8"}


def row(metric: str, unit: str, value: float, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "metric": metric, "unit": unit, "spread": Spread.of([0.9 * value, value, 1.1 * value]), "bundle": "b",
        "program": "enginecast 1", "source": "fox", "quant": "int8", "target": "openvino", "device": "CPU",
        "cpu": "x", "threads": 2, "versions": {}, "date": DAY, "fingerprint": here(),
    }  # fmt: skip
    return Row(**fields | changes)


ROWS = [
    row("unet", "s", 1.0, settings=SHAPE, bound=0.25),
    row("unet", "s", 2.0, quant="none", settings=SHAPE, bound=0.25),
    row("unet", "s", 1.5, quant="hybrid", program="optimum-intel 2", settings=SHAPE),
    *(row("operations.unet", "Gop", 80.0, quant=one, settings=SHAPE | {WEIGHTS: 10**8}) for one in ("int8", "none")),
    *(row("right", "%", value, quant=quant) for quant, value in (("int8", 97.0), ("none", 98.0))),
    *(row("size", "GB", value, quant=quant) for quant, value in (("int8", 0.1), ("none", 0.4))),
    row("picture", "s", 9.0),
    *(row(f"{kind}.picture", "GB", 2.0) for kind in ("memory", "resident")),
    *(row("batched", "pictures/min", 10.0 * batch**0.5, settings={"batch": batch}) for batch in (4, 1, 2)),
    *(row("served_throughput", "pictures/min", 9.0, settings={"load": "closed", "clients": one}) for one in (1, 4)),
    row("bandwidth", "GB/s", 20.0, source=MACHINE, target="numpy", quant="none"),
    *(row("product", "Gop/s", rate, source=MACHINE, quant=one) for one, rate in (("float32", 200.0), ("int8", 700.0))),
]  # fmt: skip


def test_the_newest_row_of_each_figure_by_machine_and_model() -> None:
    newer = row("picture", "s", 7.0, date=DAY + timedelta(days=1))
    other = row("picture", "s", 1.0, fingerprint=None, cpu="AMD EPYC")
    found = figures.by_machine([newer, *ROWS, other])
    assert list(found) == [str(here()), "AMD EPYC"] and list(found[str(here())]) == ["fox", MACHINE]
    assert [one.spread.median for one in found[str(here())]["fox"] if one.metric == "picture"] == [7.0]


def test_what_is_plotted_of_a_model() -> None:
    bars = figures.bars(ROWS)
    assert list(bars) == ["unet, s ↓", "right, % ↑", "picture, s ↓"]
    assert [(bar.label, bar.reached) for bar in bars["unet, s ↓"]] == [
        ("int8 on openvino", 0.25), ("optimum-intel hybrid on openvino", None), ("unquantized on openvino", 0.125),
    ]  # fmt: skip
    assert [bar.spread.median for bar in bars["right, % ↑"]] == [98.0, 97.0]
    unit, (line,) = figures.batches(ROWS)
    assert unit == "pictures/min" and line.points[0] == (1, 10.0) and [place for place, _ in line.points] == [1, 2, 4]
    assert figures.loads(ROWS)[1][0].points == ((1, 9.0), (4, 9.0))
    assert [(trade.label, trade.size, trade.speed) for trade in figures.trades(ROWS)] == [
        ("int8 on openvino", 0.1, 9.0), ("unquantized on openvino", 0.4, None),
    ]  # fmt: skip


def test_what_is_plotted_of_a_machine() -> None:
    bandwidth, ceilings = figures.ceilings(ROWS)
    assert bandwidth == pytest.approx(22.0)  # the best
    assert [(one.label, round(one.rate)) for one in ceilings] == [
        ("float32 on openvino", 220),
        ("int8 on openvino", 770),
    ]
    points = figures.points({"fox": ROWS})
    assert [(point.label, point.intensity, point.rate, point.reached) for point in points] == [
        ("fox unet, int8 on openvino", 800.0, 80.0, 0.25), ("fox unet, unquantized on openvino", 800.0, 40.0, 0.125),
    ]  # fmt: skip


def test_the_page_and_its_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 40)
    stored, output = tmp_path / "rows.jsonl", tmp_path / "out.html"
    hostile = row("picture", "s", 2.0, source="<script>alert(1)</script>")
    rows.append(stored, [*ROWS, hostile])
    ended = CliRunner().invoke(cli.app, ["bench", "report", str(tmp_path), "--output", str(output)])
    assert ended.exit_code == 0, ended.output
    names = {
        f"out-1-{name}.png" for name in ("roofline", *(f"fox-{one}" for one in ("speed", "trade", "batch", "load")))
    }
    assert {file.name for file in tmp_path.glob("*.png")} == names | {"out-1-script-alert-1-script-speed.png"}
    for name in names:
        with Image.open(tmp_path / name) as picture:
            width, height = picture.size
        assert width == plots.WIDTH * plots.DPI and height > 100
    text = output.read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "25 %" in text
    assert set(re.findall(r'(?:src|srcset|href)="([^"]{5})', text)) <= {"data:", "#s1-1", "#s1-2", "#s1-3"}
    encoded = re.findall(r'srcset="data:image/png;base64,([^"]+)"', text)
    dark = Image.open(io.BytesIO(base64.b64decode(encoded[0])))
    assert len(encoded) == 6 and dark.convert("RGB").getpixel((0, 0)) == (0x1D, 0x21, 0x27)


def test_which_rows_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[Row]] = []
    monkeypatch.setattr(page, "write", lambda found, output: written.append(found) or [])

    def report(*words: str) -> None:
        CliRunner().invoke(cli.app, ["bench", "report", *words], catch_exceptions=False)

    stored = tmp_path / "rows.jsonl"
    rows.append(stored, [*ROWS, row("picture", "s", 1.0, source="owl")])
    report(str(stored), "--source", "owl")
    assert {one.source for one in written[0]} == {"owl", MACHINE}
    report()
    assert len(written[1]) > 100  # those that come with the program
    with pytest.raises(InvalidInput, match="source: 'cat' is in no row: there are fox, machine, owl"):
        report(str(stored), "--source", "cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="has no files of rows"):
        report(str(tmp_path / "empty"))
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(NotFound, match="no rows to report"):
        report(str(tmp_path / "none.jsonl"))
