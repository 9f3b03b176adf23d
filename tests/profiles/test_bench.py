from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from calibration.ground import machine
from profiles import bench, cli, probes, rows
from profiles.bench import BenchPlan
from profiles.process import Worker
from profiles.tasks.image import PictureSettings, image_request
from runtime.bundle.manifest import Bundle
from runtime.diffusion.config import DiffusionConfig
from runtime.errors import EngineError, EngineUnavailable, InvalidInput, NotFound
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.fingerprint import here
from runtime.placing.loading import LoadedModel, load_model
from tests.fakes.serving import until
from tests.profiles.conftest import SAMPLE

WORKER = """
import sys
from profiles.protocol import Channel, Hello, Metric
channel = Channel()
print("a library's chatter")
name, log = sys.argv[1:]
def value(metric):
    def run():
        with open(log, "a") as file:
            file.write(name + metric + " ")
        return 1 / 0 if metric == "broken" else float(len(open(log).read().split()))
    return run
names = ["first", "broken", "only " + name]
metrics = {metric: Metric(unit="tokens/s", bytes=1e6) if metric == "first" else Metric(unit="s") for metric in names}
channel.serve(
    Hello(
        program="p " + name, target="t", device="d", threads=1, versions={}, load=0.25, metrics=metrics, quant="int4"
    ),
    {metric: value(metric) for metric in names},
)
"""


def worker(name: str, log: Path) -> Worker:
    return Worker([sys.executable, "-c", WORKER, name, str(log)])


def test_workers_are_measured_in_turns(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_bandwidth", lambda: 5e9)
    log = tmp_path / "log"
    plan = BenchPlan(repeat=2, metrics=("first", "only B"))
    found = bench.bench(bundle, [worker("A", log), worker("B", log)], plan)
    assert log.read_text().split() == ["Afirst", "Bfirst"] * 3 + ["Bonly", "B"] * 3
    by_name = {(row.program, row.metric): row for row in found}
    a, b = by_name["p A", "first"], by_name["p B", "first"]
    assert (a.spread.minimum, a.spread.maximum, a.spread.repetitions) == (
        3,
        5,
        2,
    ) and b.spread.median == 5  # the first turn is left out
    assert a.bound == 5000 and a.unit == "tokens/s"
    assert (a.bundle, a.source, a.quant, a.device, a.threads) == ("fake", "fake-source", "int4", "d", 1)
    assert a.fingerprint == here() and a.values == (3, 5) and len({row.run for row in found}) == 1
    assert by_name["p A", "load"].spread.median == 0.25
    assert 0.001 < by_name["p B", "memory"].spread.median < 1
    assert [row.metric for row in found] == ["first", "first", "only B", "load", "memory", "load", "memory"]
    console = Console(width=200, record=True, quiet=True)
    console.print(bench.table(found))


def test_what_is_measured_at_several_settings_has_one_name(bundle: Bundle) -> None:
    described = {"unit": "tokens/s", "name": "batched", "settings": {"batch": 4}, "bytes": 2.0}
    hello = {"program": "p", "target": "t", "device": "d", "threads": 1, "versions": {}, "load": 1.0}
    one: Any = SimpleNamespace(bundle=None, hello=hello | {"metrics": {"batched 4": described}})
    row = bench.row_of(bundle, one, "batched 4", [3.0, 4.0], 8.0)
    assert (row.metric, row.settings, row.bound, row.reached) == ("batched", {"batch": 4}, 4.0, 0.875)
    columns = {column.header: list(column.cells) for column in bench.table([row]).columns}
    assert columns["metric"] == ["batched 4"] and columns["of bound"] == ["88%"]
    joules = bench._energy(row, [5.0, 6.0])
    assert (joules.metric, joules.unit, joules.values, joules.bound) == ("energy.batched", "J", (5.0, 6.0), None)


def test_what_goes_wrong_in_a_worker_is_said(tmp_path: Path, bundle: Bundle) -> None:
    log = tmp_path / "log"
    with pytest.raises(EngineError, match="ZeroDivisionError: division by zero"):
        bench.bench(bundle, [worker("A", log)], BenchPlan(metrics=("broken",)))
    with pytest.raises(InvalidInput, match="metric: 'frist' is not measured of this bundle: did you mean 'first'"):
        bench.bench(bundle, [worker("A", log)], BenchPlan(metrics=("frist",)))
    with pytest.raises(NotFound, match="'no-such-worker' cannot be started"):
        bench.bench(bundle, [Worker(["no-such-worker"])], BenchPlan())
    for code, message in [
        ("", "ended with exit code 0"),
        ("print('hi')", "said 'hi'"),
        ("print('{}')", "does not begin with its metrics"),
    ]:
        with pytest.raises(EngineError, match=message):
            bench.bench(bundle, [Worker([sys.executable, "-c", code])], BenchPlan())


def test_what_a_worker_started_ends_with_it(tmp_path: Path, bundle: Bundle) -> None:
    """When another one fails, nobody waits for a worker, nor for its server."""
    log = tmp_path / "log"
    lines = ["import subprocess", f"open({str(log)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"]
    starting = Worker([sys.executable, "-c", "\n".join([*lines, WORKER]), "A", str(tmp_path / "other")])
    with pytest.raises(NotFound, match="cannot be started"):
        bench.bench(bundle, [starting, Worker(["no-such-worker"])], BenchPlan())
    stat = Path("/proc") / log.read_text() / "stat"
    until(lambda: not stat.exists() or ") Z " in stat.read_text())


def test_submodels_are_measured_at_the_sizes_of_a_request(drawing: LoadedModel) -> None:
    found = {probe.metric: probe for probe in probes.probes(drawing, {"width": 256, "height": 64, "steps": 2})}
    assert list(found) == ["text_encoder", "unet", "vae_decoder", "vae_encoder", "picture"]
    assert found["unet"].settings == {
        "sample": "2x4x4x16",
        "timestep": "2",
        "encoder_hidden_states": "2x32x8",
    }  # 2: guidance
    assert found["vae_decoder"].settings == {"latents": "1x4x4x16"}
    assert found["vae_encoder"].settings == {"image": "1x3x128x128"}
    assert found["picture"].settings == {"width": 256, "height": 64, "steps": 2}
    engines: Any = drawing.engines
    assert not any(engine.calls for engine in engines.values())
    assert all(probe.run() > 0 for probe in found.values())
    assert len(engines["unet"].calls) == 3 and len(engines["vae_decoder"].calls) == 2
    with pytest.raises(InvalidInput, match="width"):
        probes.probes(drawing, {"width": 100})


def test_requests_that_run_together(drawing: LoadedModel, tiny_bundle: Path) -> None:
    batched = [probe for probe in probes.probes(drawing, {"steps": 2}, (1, 3)) if probe.metric == probes.BATCHED]
    assert [(probe.key, probe.unit, probe.settings) for probe in batched] == [
        ("batched 1", "pictures/min", {"batch": 1, "steps": 2}),
        ("batched 3", "pictures/min", {"batch": 3, "steps": 2}),
    ]
    engines: Any = drawing.engines
    assert batched[1].run() > 0
    assert [len(call["sample"]) for call in engines["unet"].calls] == [6, 6]  # with guidance
    model = load_model(tiny_bundle, "onnxruntime")
    decoder, sizes = model.engines["decoder"], list[int]()
    run_many = decoder.run_many

    def counted(calls: Any) -> Any:
        sizes.append(len(calls))
        return run_many(calls)

    decoder.run_many = counted  # type: ignore[method-assign]
    *_, together = probes.probes(model, {"prompt_tokens": 40, "new_tokens": 5}, (2,))
    assert together.unit == "tokens/s" and together.settings["batch"] == 2 and together.run() > 0
    assert sizes == [2] * 5  # the prompts, and 4 further tokens
    model.close()


def test_a_model_for_inpainting_is_measured_with_a_mask(drawing: LoadedModel) -> None:
    settings = PictureSettings(width=256, height=64)
    assert not image_request(drawing.bundle, settings).masked
    found = drawing.bundle.manifest.config
    found.update(inpainting=True, vae={**found["vae"], "encoder": True})
    config = DiffusionConfig.parse(found)
    model = replace(drawing, pipeline=DiffusionPipeline(config, SAMPLE / "tokenizer"))
    request = image_request(model.bundle, settings)
    assert request.masked and request.width == 256
    model.pipeline(request).close()  # it is accepted
    with pytest.raises(InvalidInput, match="mask: is missing"):
        model.pipeline(replace(request, image=None, mask=None))


def test_chat_is_measured_with_a_fixed_number_of_tokens(tiny_bundle: Path) -> None:
    model = load_model(tiny_bundle, "onnxruntime")
    found = {probe.metric: probe for probe in probes.probes(model, {"prompt_tokens": 40, "new_tokens": 5})}
    assert list(found) == ["vision_encoder", "token_embedding", "first_token", "follow_up", "prefill", "decode"]
    assert found["decode"].settings["new_tokens"] == 5 and 30 < int(found["decode"].settings["prompt_tokens"]) <= 40
    decoder = model.bundle.submodel("decoder")
    assert found["decode"].nbytes is not None and found["decode"].nbytes > decoder.nbytes
    assert found["decode"].unit == found["prefill"].unit == "tokens/s"
    assert all(probe.run() > 0 for probe in found.values())
    seen, encoder = list[int](), model.engines["vision_encoder"]
    run = encoder.run
    encoder.run = lambda inputs, slot=None: seen.append(1) or run(inputs, slot)  # type: ignore[method-assign]
    assert found["follow_up"].run() > 0 and len(seen) == 1  # in the first turn
    assert found["first_token"].run() > 0 and len(seen) == 2
    with pytest.raises(InvalidInput, match="prompt_tokens: is 2, expected at least"):
        probes.probes(model, {"prompt_tokens": 2})
    with pytest.raises(InvalidInput, match="max_tokens"):
        probes.probes(model, {"new_tokens": 5000})
    model.close()


def test_command_line(tiny_bundle: Path, tmp_path: Path) -> None:
    stored = tmp_path / "rows.jsonl"
    options = "--target onnxruntime --metric decode --repeat 2 --prompt-tokens 30 --new-tokens 4 --store"
    ended = CliRunner().invoke(cli.app, ["bench", str(tiny_bundle), *options.split(), "--rows", str(stored)])
    assert ended.exit_code == 0, ended.output
    assert [row.metric for row in rows.read(stored)] == ["decode", "load", "size", "memory"]
    decode = rows.read(stored)[0]
    assert (decode.target, decode.quant, decode.spread.repetitions) == ("onnxruntime", "none", 2)
    assert "onnxruntime" in ended.output and "decode" in ended.output


def test_a_worker_that_cannot_load_says_why(bundle: Bundle) -> None:
    job = json.dumps({"bundle": str(bundle.root), "target": "openvino"})
    ended = subprocess.run([sys.executable, "-m", "profiles.worker", job], capture_output=True, text=True)
    assert ended.returncode == 1 and "error" in json.loads(ended.stdout)


def test_a_bundle_that_was_built_for_nothing(bundle: Bundle) -> None:
    with pytest.raises(EngineUnavailable, match="built for none"):
        CliRunner().invoke(cli.app, ["bench", str(bundle.root)], catch_exceptions=False)
