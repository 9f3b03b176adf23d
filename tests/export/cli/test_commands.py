"""The build side's commands: one line and the right exit code for every mistake, nothing left when they are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import export.build.build
import export.build.options
import export.cli.commands
import serving.cli.commands
from runtime.bundle.manifest import MANIFEST, Bundle


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(params=["export", "enginecast"])
def run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Run a command in process, in an empty folder, as either of the two programs that have it."""
    main = {"export": export.cli.commands.main, "enginecast": serving.cli.commands.main}[request.param]
    previous = signal.getsignal(signal.SIGTERM)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, previous))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def command(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [request.param, *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
        return Ended(int(code), *capfd.readouterr())

    return command


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> list[export.build.options.Options]:
    """No build is made: the options of each that is asked for are kept."""
    asked: list[export.build.options.Options] = []

    def build(options: export.build.options.Options, listen: object) -> tuple[Bundle, dict[str, float]]:
        asked.append(options)
        return Bundle(tiny_bundle), {"trace": 1.0}

    monkeypatch.setattr(export.build.build, "build", build)
    return asked


# Building


def test_build(run: Run, tiny_vlm: Path) -> None:
    ended = run("build", tiny_vlm, "--target", "onnxruntime", "--output", "out")
    assert ended.code == 0, ended.err
    lines = [line for line in ended.out.splitlines() if not line.endswith(" ...")]  # which a slow machine adds
    assert lines[0] == f"{tiny_vlm} -> out (none, onnxruntime)"
    assert lines[1].startswith("[ 1/17] weights") and lines[17].startswith("[17/17] bundle")
    assert all("ETA" in line for line in lines[1:18]) and "MB of weights in" in lines[18]
    again = run("build", tiny_vlm, "--target", "onnxruntime", "--output", "out")
    assert again.code == 0 and "out is up to date" in again.out
    other = run("build", tiny_vlm, "--target", "onnxruntime", "--output", "out", "--quant", "int4")
    assert other.code == 2 and "holds another bundle" in other.err and "Traceback" not in other.err


def test_graphs_alone(run: Run, tiny_vlm: Path) -> None:
    ended = run("build", tiny_vlm, "--graph-only")
    assert ended.code == 0, ended.err
    assert f"graphs/{tiny_vlm.name}: 3 graphs in" in ended.out and (Path("graphs") / tiny_vlm.name).is_dir()
    other = run("build", tiny_vlm, "--graph-only", "--quant", "int8")
    assert other.code == 2 and "quant: does not apply to --graph-only" in other.err
    without = run("build", "--graph-only")
    assert without.code == 2 and "needs a SOURCE" in without.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("--quant", "int44"),
            2,
            "quant: 'int44' is not known: did you mean 'int4'? (known: auto, bf16, fp16, fp8, int4, int8, int8-naive, "
            "int8-weight, nf4, none)",
        ),
        (("--parity", "some"), 2, "parity: 'some' is not known"),
        (("--target", "open-vino"), 3, "target 'open-vino' is not known: did you mean 'openvino'?"),
        (("--nonsense",), 2, "No such option"),
    ],
)
def test_mistakes(run: Run, tiny_vlm: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    ended = run("build", tiny_vlm, "--output", "out", *arguments)
    assert (
        ended.code == code and message in " ".join(ended.err.replace("│", "").split()) and "Traceback" not in ended.err
    )
    assert not Path("out").exists()


def test_sources_that_cannot_be(run: Run, tmp_path: Path, tiny_vlm: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["LlavaNextVideoForConditionalGeneration"]}')
    torn = shutil.copytree(tiny_vlm, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:50_000])
    for source, code, message in (
        (tmp_path / "nowhere", 3, "does not exist: expected a folder"),
        ("sample:shapes-vlmm", 3, "there is no sample 'shapes-vlmm': did you mean 'shapes-vlm'?"),
        (other, 4, "no family handles: did you mean 'LlavaNextForConditionalGeneration'? (known:"),
        (torn, 4, "model.safetensors is truncated"),
    ):
        ended = run("build", source, "--output", "out")
        assert (ended.code, message in ended.err) == (code, True), ended.err
        assert ended.err.count("\n") == 1 and not Path("out").exists()


def test_without_a_source_both_samples_are_built(run: Run, built: list[export.build.options.Options]) -> None:
    assert run("build", "--quant", "int8").code == 0
    assert [(options.source, str(options.output)) for options in built] == [
        ("sample:shapes-diffusion", "bundles/shapes-diffusion-int8"),
        ("sample:shapes-vlm", "bundles/shapes-vlm-int8"),
    ]
    assert {options.targets for options in built} == {("onnxruntime", "openvino")}


def test_settings_list_what_to_build(run: Run, built: list[export.build.options.Options]) -> None:
    Path("enginecast.toml").write_text(
        '[[build]]\nsource = "sample:shapes-vlm"\nquant = "int4"\ntarget = "onnxruntime"\noutput = "x/y"\n'
        '[[build]]\nsource = "org/model"\n'
    )
    assert run("build").code == 0
    assert [(o.source, o.quant, o.targets, str(o.output)) for o in built] == [
        ("sample:shapes-vlm", "int4", ("onnxruntime",), "x/y"),
        ("org/model", "none", ("onnxruntime", "openvino"), "bundles/model-none"),
    ]
    built.clear()
    assert run("build", "--target", "openvino", "--quant", "int8", "--output", "all").code == 0
    assert [(o.quant, o.targets, str(o.output)) for o in built] == [
        ("int8", ("openvino",), "all/y"),
        ("int8", ("openvino",), "all/model-int8"),
    ]
    built.clear()
    assert run("build", "--quant", "none").code == 0
    assert [options.quant for options in built] == ["none", "none"]
    built.clear()
    assert run("build", "sample:shapes-diffusion", "--output", "z").code == 0
    assert [(o.source, str(o.output)) for o in built] == [("sample:shapes-diffusion", "z")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[build", "is no TOML"),
        ("", "'build' is wrong (Field required), expected [[build]] tables with a source"),
        ("build = []", "'build' is wrong"),
        ("build = 3", "'build' is wrong"),
        ("[[build]]\nquant = 'int8'", "'build.0.source' is wrong (Field required)"),
        ("[[build]]\nsource = 'x'\nquality = 1", "'build.0.quality' is wrong (Extra inputs are not permitted)"),
        ("[[build]]\nsource = 'x'\nquant = 8", "'build.0.quant' is wrong"),
        ("[[build]]\nsource = 'x'\noutput = 8", "'build.0.output' is wrong"),
        ("[[build]]\nsource = 'x'\ntarget = [3]", "'build.0.target."),
        ("[[build]]\nsource = 'x'\n[[Build]]", "'Build' is wrong"),
    ],
)
def test_settings_with_mistakes(run: Run, text: str, message: str) -> None:
    Path("enginecast.toml").write_text(text)
    ended = run("build")
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1


# Killing


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda end: end.name)
def test_a_killed_build_leaves_nothing(tiny_vlm: Path, tmp_path: Path, end: signal.Signals) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "export",
        "build",
        str(tiny_vlm),
        "--target",
        "onnxruntime",
        "--output",
        str(out / "b"),
    ]
    environment = os.environ | {"ENGINECAST_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        while "vision_encoder   trace" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        assert [path.name.startswith(".b.building-") for path in out.iterdir()] == [True]
        process.send_signal(end)
        process.wait(60)
        errors = process.stderr.read()
    deadline = time.monotonic() + 30
    while list(out.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(out.iterdir())
    assert all(path.name.count(".") == 1 for path in cache.iterdir()), "finished steps only"
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[end]
    assert "Traceback" not in errors


# Looking


def test_inspect(run: Run, tiny_bundle: Path) -> None:
    ended = run("inspect", tiny_bundle)
    assert ended.code == 0, ended.err
    for expected in (
        "tiny-vlm: LlavaForConditionalGeneration (llava), quant none, pipeline chat",
        "parity full, error ",
        "<- pixel_values float32 [images 1..16, 3, 32, 32]",
        "<- attention_mask int64 [batch 1..64, total 1..1024]",
        "-> logits float32 [batch 1..64, 1, 512]",
        "4 states, such as past_key_values.0.key float32 [batch 1..64, 2, past 0..1024, 8]",
        "decoder.onnx",
    ):
        assert expected in ended.out, ended.out
    for submodel in Bundle(tiny_bundle).manifest.submodels:
        assert f"{submodel.name}: {submodel.nbytes / 1e6:.1f} MB, float16" in ended.out


def test_verify(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    ended = run("verify", bundle)
    assert ended.code == 0 and "files, all as they were built" in ended.out
    weights = bundle / "onnx" / "decoder" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ended = run("verify", bundle)
    assert (
        ended.code == 6 and "onnx/decoder/weights.safetensors was altered" in ended.err and "Traceback" not in ended.err
    )


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_folders_that_are_no_bundles(run: Run, tmp_path: Path, command: str) -> None:
    assert run(command, tmp_path / "nowhere").code == 3
    assert run(command, tmp_path).code == 6
    (tmp_path / MANIFEST).write_text(json.dumps({"schema_version": 99}))
    ended = run(command, tmp_path)
    assert ended.code == 6 and "has schema version 99, this program reads 1 to 3" in ended.err
