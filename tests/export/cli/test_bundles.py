"""Commands on finished bundles: a copy of a real one gets engines, a signature, loses its graphs; every mistake is one
line.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import export.build.build
import export.build.options
import export.cli.commands
from runtime.bundle.manifest import MANIFEST, SIGNATURE, Bundle
from runtime.engine import targets
from tests.fakes.bound import Bound


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command in process, in an empty folder, with a target whose engines fit one machine beside the
    real ones.
    """
    monkeypatch.setitem(targets(), "bound", Bound)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        code: Any = 0
        try:
            export.cli.commands.main()
        except SystemExit as exit:
            code = exit.code or 0
        return Ended(int(code), *capfd.readouterr())

    return command


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "b")


def test_targets(run: Run) -> None:
    ended = run("targets")
    assert ended.code == 0
    lines = {line.split()[0]: line for line in ended.out.splitlines()}
    assert set(targets()) < set(lines) and ended.out.startswith("target")
    for name, engine in targets().items():
        found = engine.available()
        assert lines[name].split()[1:3] == [
            "yes" if one else "no" for one in (found.usable or found.compiles, found.usable)
        ]
        assert found.version in lines[name] and (found.reason or found.devices[0]) in lines[name], "nothing is cut off"


def test_add_a_target_sign_and_verify(run: Run, bundle: Path) -> None:
    assert run("keygen", "private.pem").out == f"private.pem signs, private.pub.pem checks: key {key_of_last()}\n"
    ended = run("add-target", bundle, "--target", "bound", "--setting", "bound.shapes=small")
    assert ended.code == 0, ended.err
    assert "[ 3/6] decoder" in ended.out and "a fake computes nothing to compare" in ended.out
    assert (
        "b: bound, vision_encoder.bound, token_embedding.bound, decoder.bound" in ended.out
        and "as bundles of one target each" in ended.out
    )
    told = run("inspect", bundle).out
    assert "here this machine" in told and "bound 0.0 MB" in told and "signed" not in told
    assert "is not signed, and a signature is required" in run("verify", bundle, "--signature", "private.pub.pem").err
    assert run("sign", bundle, "--key", "private.pem").code == 0
    ended = run("verify", bundle, "--signature", "private.pub.pem")
    assert ended.code == 0 and "all as they were built, signed by the owner of private.pub.pem" in ended.out
    assert run("verify", bundle).code == 0 and "signed; `enginecast verify" in run("inspect", bundle).out
    ended = run("add-target", bundle, "--target", "bound")
    assert ended.code == 2 and "key: is missing" in ended.err and "--force drops the signature" in ended.err
    ended = run("add-target", bundle, "--target", "bound", "--key", "private.pem")
    assert ended.code == 0 and not ended.err and run("verify", bundle, "--signature", "private.pub.pem").code == 0
    ended = run("add-target", bundle, "--target", "bound", "--force")
    assert (
        ended.code == 0
        and ended.err == f"warning: {bundle} is no longer signed\n"
        and not (bundle / SIGNATURE).exists()
    )


def key_of_last() -> str:
    from runtime.bundle.signing import _name, public_key

    return _name(public_key(Path("private.pub.pem")))[:16]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("add-target", "b", "--target", "bond"), 3, "target 'bond' is not known: did you mean 'bound'"),
        (("add-target", "nowhere", "--target", "bound"), 3, "bundle nowhere does not exist"),
        (("add-target", "b"), 2, "Missing option '--target'"),
        (
            ("add-target", "b", "--target", "bound", "--setting", "bound"),
            2,
            "setting: 'bound' is none, expected TARGET.NAME=VALUE",
        ),
        (
            ("add-target", "b", "--target", "bound", "--setting", "openvino.x=1"),
            2,
            "setting: is for openvino, which is not among the targets",
        ),
        (
            ("add-target", "b", "--target", "bound", "--compute-capability", "8.9"),
            2,
            "compute-capability: is of tensorrt targets",
        ),
        (
            ("strip", "b"),
            2,
            "strip-canonical: leaves out graphs and weights that are read when these targets are loaded: openvino, "
            "onnxruntime.",
        ),
        (("strip", "nowhere"), 3, "does not exist"),
        (
            ("sign", "b", "--key", "nowhere.pem"),
            3,
            "key nowhere.pem does not exist: make a pair with `enginecast keygen`",
        ),
        (("sign", "b", "--key", "b/manifest.json"), 2, "key: b/manifest.json is no private key in PEM"),
        (("verify", "b", "--signature", "b/manifest.json"), 2, "key: b/manifest.json is no public key in PEM"),
        (("keygen", "b/manifest.json"), 2, "output: b/manifest.json exists, and keys are never overwritten"),
        (("keygen", "nowhere/private.pem"), 9, "cannot write nowhere/private.pem: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes(run: Run, bundle: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    ended = run(*arguments)
    assert (ended.code, message in " ".join(ended.err.replace("│", "").split())) == (code, True), ended.err
    assert "Traceback" not in ended.err and {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


def test_strip(run: Run, bundle: Path) -> None:
    assert run("add-target", bundle, "--target", "bound").code == 0
    told = json.loads((bundle / MANIFEST).read_text())
    told["artifacts"] = [one for one in told["artifacts"] if one["target"] == "bound"]
    told["files"] = {path: found for path, found in told["files"].items() if not path.startswith("engines/onnxruntime")}
    (bundle / MANIFEST).write_text(json.dumps(told))
    shutil.rmtree(bundle / "engines" / "onnxruntime")
    graphs = sum(path.stat().st_size for path in (bundle / "onnx").rglob("*") if path.is_file())
    ended = run("strip", bundle)
    assert (
        ended.code == 0 and ended.out == f"{bundle}: {graphs / 1e6:.1f} MB less\n" and run("verify", bundle).code == 0
    )
    assert "without canonical graphs" in run("inspect", bundle).out
    assert run("strip", bundle).out == f"{bundle} has no canonical graphs\n"
    ended = run("add-target", bundle, "--target", "bound")
    assert ended.code == 6 and "has no canonical graphs, which a target is compiled from" in ended.err


def test_adding_needs_no_torch(bundle: Path) -> None:
    script = (
        "import sys; from runtime.engine import targets; from tests.fakes.bound import Bound; "
        "targets()['bound'] = Bound; "
        "import export.cli.commands; "
        f"sys.argv = ['export', 'add-target', {str(bundle)!r}, '--target', 'bound', '--target', 'onnxruntime']; "
        "export.cli.commands.main()"
    )
    script = script.replace(
        "export.cli.commands.main()",
        "export.cli.commands.app(standalone_mode=False); print(sorted({'torch', 'diffusers'} & set(sys.modules)))",
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
    Bundle(bundle).verify()


def test_auto_reaches_the_build_as_names(run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[export.build.options.Options] = []

    def build(options: export.build.options.Options, listen: object) -> tuple[Bundle, dict[str, float]]:
        asked.append(options)
        return Bundle(tiny_bundle), {"trace": 1.0}

    monkeypatch.setattr(export.build.build, "build", build)
    assert run("build", "sample:shapes-vlm", "--target", "auto", "--output", "out").code == 0
    assert set(asked[0].targets) >= {"onnxruntime", "openvino", "bound"} and "auto" not in asked[0].targets


# TensorRT for RTX, which compiles without a GPU


def test_a_real_engine_is_added(run: Run, bundle: Path) -> None:
    found = targets()["tensorrt-rtx"].available()
    if not found.compiles:
        pytest.skip(f"tensorrt-rtx: {found.reason}")
    told = json.loads((bundle / MANIFEST).read_text())
    told["submodels"] = [one for one in told["submodels"] if one["name"] == "token_embedding"]
    told["artifacts"] = [one for one in told["artifacts"] if one["submodel"] == "token_embedding"]
    (bundle / MANIFEST).write_text(json.dumps(told))
    ended = run("add-target", bundle, "--target", "tensorrt-rtx", "--compute-capability", "8.9")
    assert ended.code == 0, ended.err
    opened = Bundle(bundle)
    opened.verify()
    (artifact,) = opened.artifacts("tensorrt-rtx", "token_embedding")
    assert (
        artifact.key["compute_capability"] == "8.9" and artifact.key["sdk"] == found.version and not artifact.settings
    )
    if not found.usable:
        told = run("inspect", bundle).out
        assert "tensorrt-rtx: does not run here: there is no NVIDIA GPU" in told
        rows = [line.split() for line in told.splitlines() if line.startswith(("tensorrt-rtx  ", "onnxruntime  "))]
        assert {(row[0], row[-1]) for row in rows} == {("tensorrt-rtx", "no"), ("onnxruntime", "yes")}, (
            "as `targets` says"
        )
    ended = run("add-target", bundle, "--target", "tensorrt-rtx", "--compute-capability", "12.0")
    assert ended.code == 0 and len(Bundle(bundle).artifacts("tensorrt-rtx", "token_embedding")) == 2
    engine = bundle / "engines/tensorrt-rtx/token_embedding.engine"
    engine.write_bytes(engine.read_bytes()[:-100])
    ended = run("verify", bundle)
    assert ended.code == 6 and "engines/tensorrt-rtx/token_embedding.engine was altered" in ended.err
