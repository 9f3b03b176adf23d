from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from enginecast.testing import FakeServer
from profiles import cli, rows
from profiles.process import Worker
from profiles.serving import bench
from profiles.serving.bench import LoadPlan, percentile
from profiles.serving.load import Load
from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError, InvalidInput

WORKER = """
import sys
from profiles.protocol import Channel, Hello, Metric
channel = Channel()
name, unit, log, speed = sys.argv[1:]
def answer(line):
    with open(log, "a") as file:
        file.write(f"{name} {line}; ")
    amount = float(speed) * float(line.split()[1])
    first = [number / 100 for number in range(1, 101)]
    found = {"amount": amount, "seconds": 2, "first": first, "refused": int(name == "B")}
    return {"wrong": 1} if speed == "0" else found
metrics = {"served_throughput": Metric(unit=unit, settings={"new_tokens": 9})} if unit else {}
hello = Hello(program=name, target="t", device="d", threads=1, versions={}, load=0.25, metrics=metrics)
channel.answer(hello, answer)
"""


def worker(name: str, log: Path, speed: int, unit: str = "tokens/s") -> Worker:
    return Worker([sys.executable, "-c", WORKER, name, unit, str(log), str(speed)])


def test_servers_are_loaded_in_turns(tmp_path: Path, bundle: Bundle) -> None:
    log = tmp_path / "log"
    plan = LoadPlan((Load("closed", 2, 4), Load("open", 0.5, 4)), repeat=2)
    workers = [worker("A", log, 10), worker("B", log, 30, "pictures/min")]
    found = bench.bench(bundle, workers, plan)
    lines = [*["A closed 2 4", "B closed 2 4"] * 3, *["A open 0.5 4", "B open 0.5 4"] * 3]
    assert log.read_text().rstrip("; ").split("; ") == lines
    closed = {(row.program, row.metric): row for row in found if row.settings.get("load") == "closed"}
    a, b = closed["A", "served_throughput"], closed["B", "served_throughput"]
    assert (a.spread.median, a.unit, b.spread.median, b.unit) == (10, "tokens/s", 60 / 2 * 60, "pictures/min")
    assert a.settings == {"load": "closed", "clients": 2, "requests": 4, "new_tokens": 9}
    for percent in (50, 95, 99):
        assert closed["A", f"served_first_p{percent}"].spread.median == percent / 100
    assert closed["B", "served_refused"].spread.median == 1 and ("A", "served_refused") not in closed
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(bench.table(found))
    shown = console.export_text()
    assert "closed 2" in shown and "open 0.5/s" in shown and "180.00" in shown


def test_a_worker_that_measures_no_servers(tmp_path: Path, bundle: Bundle) -> None:
    plan = LoadPlan((Load("closed", 1, 1),), repeat=1)
    with pytest.raises(EngineError, match="no metric served_throughput"):
        bench.bench(bundle, [worker("A", tmp_path / "log", 1, unit="")], plan)
    with pytest.raises(EngineError, match=r"answered .*wrong.* for the load closed 1 1, expected amount"):
        bench.bench(bundle, [worker("A", tmp_path / "log", 0)], plan)


def test_percentiles_are_values_that_were_observed() -> None:
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (1, 50, 67, 100)] == [1, 2, 3, 3]


def test_a_server_is_started_from_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    stored = tmp_path / "rows.jsonl"
    options = "--serve --target onnxruntime --clients 2 --requests 4 --rate 50 --repeat 1 --prompt-tokens 30 "
    options += f"--new-tokens 4 --pictures --store --rows {stored}"
    ended = CliRunner().invoke(cli.app, ["bench", str(tiny_bundle), *options.split()])
    assert ended.exit_code == 0, ended.output
    found = rows.read(stored)
    loads = ["served_throughput", "served_first_p50", "served_first_p95", "served_first_p99"]
    assert [row.metric for row in found] == [*loads, *loads, "load", "memory"]
    assert found[0].unit == "tokens/s" and found[0].settings["clients"] == 2 and found[4].settings["rate"] == 50
    assert found[0].program.endswith(" served") and found[0].target == "onnxruntime"


def test_a_server_that_runs(bundle: Bundle, tmp_path: Path) -> None:
    with FakeServer(tmp_path / "server") as server:
        options = ["--serve", "--address", server.address, "--model", "draw", "--clients", "3", "--repeat", "1"]
        ended = CliRunner().invoke(cli.app, ["bench", str(bundle.root), *options, "--steps", "2"])
        assert ended.exit_code == 0, ended.output
        assert "pictures/min" in ended.output and server.draw.calls == 2 * 12 * 2


def test_a_server_that_cannot_start(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="built for none"):
        CliRunner().invoke(cli.app, ["bench", str(bundle.root), "--serve"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--clients 2", "clients: belongs to --serve"),
        ("--address localhost:1", "address: belongs to --serve"),
        ("--serve --metric unet", "metric: and --serve exclude"),
        ("--serve --model x", "model: belongs to --address"),
        ("--serve --address localhost:1 --target openvino", "target: and --address exclude"),
        ("--serve --pictures", "pictures: does not apply to a model that draws"),
    ],
)
def test_options_that_do_not_go_together(bundle: Bundle, options: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        CliRunner().invoke(cli.app, ["bench", str(bundle.root), *options.split()], catch_exceptions=False)
