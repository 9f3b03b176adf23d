"""Options that cannot be are refused at once: before a model is looked at, before the libraries that models are made
with are imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from export.build.options import CaptureOptions, Options
from runtime.bundle.manifest import MANIFEST
from runtime.errors import EnginecastError, InvalidInput, NotFound, ResourceExhausted

PROGRAM = """
import sys
from importlib.abc import MetaPathFinder
class Refusing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name not in ("torch", "transformers", "diffusers"), f"{name} was imported"
sys.meta_path.insert(0, Refusing())
from serving.cli.commands import main
main()
"""


def refused(cwd: Path, *arguments: object) -> str:
    """What a command says that is refused without importing any of the large libraries."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)
    assert ended.returncode in (2, 3, 9) and "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr


def test_refused_before_anything_is_imported(tiny_diffusion: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"image": "x.png", "question": "what?"}\n')
    (tmp_path / "file").write_text("x")
    said = refused(tmp_path, "calibrate", tiny_diffusion, "--questions", "q.jsonl", "--output", "set.safetensors")
    assert "questions: " in said and "draw" in said
    bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
    said = refused(tmp_path, "build", tiny_diffusion, "--output", bundle)
    assert "output: " in said and "holds another bundle: of another source" in said and "--force" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "full"}, "quality: is of no use without --quant"),
        ({"speed": "full"}, "speed: is of no use without --quant"),
        ({"allow_low_quality": True}, "allow_low_quality: is of no use without --quant"),
        ({"quant": "int8", "quality": "none", "speed": "full"}, "speed: is of no use with --quality none"),
        (
            {"quant": "int8", "speed": "full", "targets": ("onnxruntime", "coreml")},
            "speed: cannot be full: coreml does not run here",
        ),
        ({"agreement": "some"}, "agreement: 'some' is not known"),
        (
            {"settings": {"onnxruntime": {"threads": "2"}}},
            "setting: onnxruntime.threads: is no setting of target onnxruntime, which has none",
        ),
        (
            {"targets": ("coreml",), "settings": {"coreml": {"contxt": "8"}}},
            r"setting: coreml\.contxt: .*\(known: .*context",
        ),
        ({"targets": ("coreml",), "settings": {"coreml": {"context": "many"}}}, r"setting: coreml\.context: "),
        (
            {"settings": {"coreml": {"context": "8"}}},
            "setting: is for coreml, which is not among the targets onnxruntime",
        ),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Options("x", tmp_path / "b", **options)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"quant": "int8"}, "quantization"),
        ({"source": "sample:shapes-vlm"}, "source"),
        ({"name": "another"}, "name"),
        ({"targets": ("coreml",)}, "set of targets"),
        ({"quant": "int8", "name": "another"}, "quantization and name"),
    ],
)
def test_another_bundle_at_the_output(tiny_vlm: Path, tiny_bundle: Path, change: dict[str, Any], what: str) -> None:
    Options(str(tiny_vlm), tiny_bundle).check()
    options = {"source": str(tiny_vlm), "output": tiny_bundle} | change
    with pytest.raises(
        InvalidInput,
        match=f"holds another bundle: of another {what}. Choose another folder, or replace it with --force",
    ):
        Options(**options).check()
    Options(**options, force=True).check()


def test_a_damaged_bundle_is_left_to_the_build(tiny_vlm: Path, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    Options(str(tiny_vlm), tmp_path).check()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output": "file"}, InvalidInput, "exists and is no bundle"),
        ({"output": "file/b"}, ResourceExhausted, "file is no folder"),
        ({"output": "/proc/b"}, ResourceExhausted, "cannot write beside /proc/b"),
        ({"source": "nowhere"}, NotFound, "nowhere does not exist"),
        ({"quant": "int8", "calibration": Path("none")}, NotFound, "calibration set none does not exist"),
    ],
)
def test_places(
    tiny_vlm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[EnginecastError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    options = {"source": str(tiny_vlm), "output": "b"} | change
    if options["output"] == "/proc/b" and os.access("/proc", os.W_OK):
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/proc")  # nothing is closed to the superuser
    with pytest.raises(error, match=message):
        Options(**{**options, "output": Path(options["output"])}).check()
    if "output" in change:
        with pytest.raises(EnginecastError):
            CaptureOptions(str(tiny_vlm), Path(change["output"])).check()


def test_a_disk_that_is_too_small(tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.build.build import build
    from export.build.state import Build

    sizes = {
        quant: Build.open(Options(str(tiny_vlm), tmp_path / "b", quant=quant)).least_bytes()
        for quant in ("none", "int8", "int4")
    }
    assert sizes["none"] == 2 * sizes["int8"] == 4 * sizes["int4"] > 10_000, "its weights are float16"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(sizes["none"] - 1))
    with pytest.raises(ResourceExhausted, match=r"needs at least 0\.00 GB and 0\.00 GB are free"):
        build(Options(str(tiny_vlm), tmp_path / "b"), lambda report: pytest.fail("work was begun"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-drop", "2"), "max-drop: belongs to --quant auto, not to none"),
        (("--optimize", "speed", "--quant", "int8"), "optimize: belongs to --quant auto, not to int8"),
        (("--compute-capability", "8.9"), "compute-capability: is of tensorrt targets"),
        (("--block", "32"), "block: is 32 with --quant none"),
    ],
)
def test_options_of_the_command(
    tiny_vlm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    from serving.cli.commands import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["enginecast", "build", str(tiny_vlm), *arguments])
    with pytest.raises(SystemExit):
        main()
    assert message in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_every_entry_is_checked_before_the_first_is_built(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from serving.cli.commands import main

    monkeypatch.chdir(tmp_path)
    Path("enginecast.toml").write_text(
        f'[[build]]\nsource = {json.dumps(str(tiny_vlm))}\n[[build]]\nsource = "sample:shapes-vlmm"\n'
    )
    monkeypatch.setattr(sys, "argv", ["enginecast", "build"])
    with pytest.raises(SystemExit):
        main()
    ended = capfd.readouterr()
    assert "did you mean 'shapes-vlm'" in ended.err and not ended.out
