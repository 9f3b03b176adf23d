"""Bundles that change: for another target, without their graphs, signed anew. Killed at any moment, they are the old or
the new one.
"""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import export.finished.artifacts
from export.finished.artifacts import (
    Signed,
    add_target,
    check_strippable,
    every_target,
    remove_graphs,
    resolve_targets,
    strip,
)
from export.report.sizes import sizes
from runtime.bundle.manifest import MANIFEST, SCHEMA, SIGNATURE, Artifact, Bundle, sha256
from runtime.bundle.signing import generate, require_signature, sign
from runtime.engine import Availability, Compiled, Engine, targets
from runtime.errors import (
    BundleError,
    EngineError,
    EngineUnavailable,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from tests.fakes.bound import Bound

TENSOR = {"inputs": [{"name": "x", "dtype": "float32", "dims": [1]}], "outputs": []}
ADD = """
import sys
from pathlib import Path
from export.finished.artifacts import add_target
from runtime.engine import targets
from tests.fakes.bound import Bound
class Slow(Bound):
    seconds = 60
targets()["bound"] = Slow
add_target(Path(sys.argv[1]), "bound", listen=lambda report: print(report.detail, flush=True))
"""
SWAP = """
import os, signal, sys
from pathlib import Path
import export.finished.artifacts
from runtime.engine import targets
from tests.fakes.bound import Bound
targets()["bound"] = Bound
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(*eval(sys.argv[2]), die)
export.finished.artifacts.add_target(Path(sys.argv[1]), "bound")
"""


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Engine]:
    """A target whose engines fit one machine, known beside the others."""
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(targets(), "bound", Bound)
    return Bound


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A bundle of two submodels, which openvino reads as they are."""
    root, files = tmp_path / "bundle", {}
    for name in (
        "onnx/unet/model.onnx",
        "onnx/unet/weights.safetensors",
        "onnx/vae/model.onnx",
        "tokenizer/vocab.json",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 10)
        files[name] = sha256(root / name)
    parts = [
        {
            "name": name,
            "signature": TENSOR,
            "graph": f"onnx/{name}/model.onnx",
            "precision": {"weights": ["float16"]},
            "nbytes": 3,
        }
        for name in ("unet", "vae")
    ]
    manifest = {
        "schema_version": SCHEMA, "name": "shapes", "key": "k", "pipeline": "diffusion", "task": "image",
        "quant": "none",
        "source": {"name": "s", "family": "f", "architecture": "a", "fingerprint": "0"}, "submodels": parts,
        "artifacts": [{"target": "openvino", "submodel": name} for name in ("unet", "vae")], "config": {},
        "versions": {}, "files": files,
    }  # fmt: skip
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# Adding


def test_a_target_is_added(root: Path, tmp_path: Path) -> None:
    before, reports = Bundle(root), []
    after, added = add_target(root, "bound", {"shapes": "small"}, listen=reports.append)
    after.verify()
    assert after.targets == ("openvino", "bound") and [one.files for one in added] == [("unet.bound",), ("vae.bound",)]
    assert all(one.key == {"here": "this machine"} and one.settings == {"shapes": "small"} for one in added)
    assert (root / "engines/bound/unet.bound").read_text().startswith(sha256(root / "onnx/unet/model.onnx"))
    assert before.manifest.files.items() <= after.manifest.files.items() and after.manifest.key == before.manifest.key
    assert any("Sliding beads" in report.detail for report in reports) and reports[-1].number == reports[-1].total == 4
    assert {one.unchecked for one in added} == {"a fake computes nothing to compare"}
    assert (root / "engines/bound").stat().st_mode & 0o777 == (root / "onnx").stat().st_mode & 0o777, (
        "others may read it as well"
    )


def test_engines_for_several_machines_lie_side_by_side(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_target(root, "bound")
    monkeypatch.setattr(Bound, "here", "that machine")
    after, added = add_target(root, "bound")
    after.verify()
    assert [one.key["here"] for one in after.artifacts("bound", "unet")] == ["this machine", "that machine"]
    assert all(one.folder and one.files == (f"{one.submodel}.bound",) for one in added)
    kinds = {
        (Compiled.of(root, one).folder / one.files[0]).read_text().split()[-2]
        for one in after.artifacts("bound", "vae")
    }
    assert kinds == {"this", "that"}
    again, replaced = add_target(root, "bound", {"shapes": "large"})
    again.verify()
    assert len(again.artifacts("bound", "unet")) == 2 and replaced[0].settings == {"shapes": "large"}, (
        "the same machine's are replaced"
    )
    assert not Compiled.of(root, added[0]).folder.exists(), "and removed"


def test_the_same_again_changes_nothing_but_the_time(root: Path) -> None:
    first, _ = add_target(root, "bound")
    second, _ = add_target(root, "bound")
    third, _ = add_target(root, "bound")
    third.verify()
    assert (
        sorted(second.manifest.files.values()) == sorted(first.manifest.files.values())
        and second.manifest.files == third.manifest.files
    )


def test_a_target_that_stores_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Thin(Bound):
        target = "thin"

        @classmethod
        def compile_with(cls, options: Any, submodel: Any, graph: Path, output: Path) -> Artifact:
            return Artifact(target="thin", submodel=submodel.name)

    monkeypatch.setitem(targets(), "thin", Thin)
    before = content(root)
    after, _ = add_target(root, "thin")
    after.verify()
    assert after.targets == ("openvino", "thin") and content(root).keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("bond", NotFound, "target 'bond' is not known: did you mean 'bound'"),
        ("absent", EngineUnavailable, "cannot compile for absent: there is none"),
    ],
)
def test_targets_that_cannot_be_added(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], message: str
) -> None:
    absent = type(
        "Absent",
        (Bound,),
        {"target": "absent", "available": classmethod(lambda cls: Availability(False, reason="there is none"))},
    )
    monkeypatch.setitem(targets(), "absent", absent)
    before = content(root)
    with pytest.raises(error, match=message):
        add_target(root, name)
    assert content(root) == before


def test_a_target_without_the_kernels(root: Path) -> None:
    manifest = json.loads((root / MANIFEST).read_text()) | {"quant": "fp8"}
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput, match="target: bound cannot compute in fp8"):
        add_target(root, "bound")


def test_from_damaged_graphs_nothing_is_compiled(root: Path) -> None:
    (root / "onnx/vae/model.onnx").write_bytes(b"?")
    before = content(root)
    with pytest.raises(BundleError, match=r"onnx/vae/model\.onnx was altered"):
        add_target(root, "bound")
    assert content(root) == before


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk of .*bundle is full: free some space"),
        (errno.EROFS, "cannot change .*bundle: .*Read-only"),
    ],
)
@pytest.mark.parametrize("where", ["vanishing", "written"])
def test_a_bundle_that_cannot_be_written(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, where: str
) -> None:
    def refuse(*_: object) -> Any:
        raise OSError(number, "Read-only file system" if number == errno.EROFS else "No space left on device")

    before = content(root)
    with monkeypatch.context() as patch, pytest.raises(ResourceExhausted, match=message):
        patch.setattr(export.finished.artifacts, where, refuse)
        add_target(root, "bound")
    Bundle(root).verify(unknown=False)
    assert before.items() <= content(root).items()
    add_target(root, "bound")[0].verify()


def test_one_program_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*_: object) -> Any:
        for change in (lambda: add_target(root, "bound"), lambda: strip(root)):
            with pytest.raises(Unavailable, match="is being changed by another program: try again when it is done"):
                change()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bound, "compile_with", meanwhile)
        add_target(root, "bound")
    Bundle(root).verify()


def test_a_bundle_that_was_replaced_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with = Bound.compile_with

    def meanwhile(*arguments: Any) -> Any:
        manifest = json.loads((root / MANIFEST).read_text()) | {"name": "another"}
        (root / MANIFEST).write_text(json.dumps(manifest))
        return compile_with(*arguments)

    with monkeypatch.context() as patch, pytest.raises(BundleError, match="was changed by another program meanwhile"):
        patch.setattr(Bound, "compile_with", meanwhile)
        add_target(root, "bound")
    Bundle(root).verify(unknown=False)
    add_target(root, "bound")[0].verify()


def test_killed_while_it_compiles_the_old_bundle_is_left(root: Path) -> None:
    before = content(root)
    with subprocess.Popen([sys.executable, "-c", ADD, str(root)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "Sliding beads" not in process.stdout.readline():
            assert process.poll() is None
        assert content(root) != before
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 120
    while any(root.glob(".adding-*")) and time.monotonic() < deadline:  # the janitor removes it
        time.sleep(0.05)
    assert content(root) == before
    Bundle(root).verify()


@pytest.mark.parametrize(
    ("place", "new"),
    [
        ("(export.finished.artifacts, 'swap')", False),
        ("(export.finished.artifacts, 'written')", False),
        ("(export.finished.artifacts.Bundle, 'unknown_files')", True),
        ("(export.finished.artifacts.Path, 'rmdir')", True),
    ],
    ids=["files in place", "manifest unwritten", "manifest written", "files removed"],
)
def test_killed_while_it_swaps_one_of_the_two_is_left(
    root: Path, place: str, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bound, "here", "that machine")
    add_target(root, "bound", {"shapes": "small"})  # something that is replaced
    monkeypatch.setattr(Bound, "here", "this machine")
    add_target(root, "bound", {"shapes": "small"})
    before = Bundle(root)
    ended = subprocess.run([sys.executable, "-c", SWAP, str(root), place], check=False)
    assert ended.returncode == -signal.SIGKILL
    after = Bundle(root)
    after.verify(unknown=False)
    assert (after.content != before.content) == new
    assert [one.settings for one in after.artifacts("bound", "unet")][-1] == ({} if new else {"shapes": "small"})
    add_target(root, "bound")[0].verify()


def test_what_is_added_is_compared_with_the_graphs(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(tiny_bundle, tmp_path / "b")
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["artifacts"] = [one for one in manifest["artifacts"] if one["target"] != "onnxruntime"]
    (root / MANIFEST).write_text(json.dumps(manifest))
    _, added = add_target(root, "onnxruntime")
    assert [one.agreement is not None and one.agreement.snr_db > 100 for one in added] == [True] * 3
    engine, before = targets()["onnxruntime"], content(root)

    class Wrong(engine):  # type: ignore[misc, valid-type]
        def run(self, inputs: Any, slot: Any = None) -> dict[str, Any]:
            return {name: values + 1 for name, values in super().run(inputs, slot).items()}

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="does not compute what its graph says"):
        patch.setitem(targets(), "onnxruntime", Wrong)
        add_target(root, "onnxruntime", {})
    assert content(root) == before
    monkeypatch.setattr(export.finished.artifacts, "CHECKED_BYTES", 0)
    assert {one.unchecked for one in add_target(root, "onnxruntime")[1]} == {export.finished.artifacts.TOO_LARGE}


# Signatures


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    generate(tmp_path / "private.pem", tmp_path / "public.pem")
    return tmp_path


def test_a_change_makes_a_signature_void_or_a_new_one(root: Path, keys: Path) -> None:
    sign(Bundle(root), keys / "private.pem")
    before = content(root)
    for change in (
        lambda: add_target(root, "bound"),
        lambda: add_target(root, "bound", signed=Signed(keys / "public.pem")),
    ):
        with pytest.raises(InvalidInput, match="key: "):
            change()
    assert content(root) == before
    signed, _ = add_target(root, "bound", signed=Signed(keys / "private.pem"))
    require_signature(signed, keys / "public.pem")
    dropped, _ = add_target(root, "bound", {"shapes": "small"}, signed=Signed(drop=True))
    dropped.verify()
    assert not (root / SIGNATURE).exists()
    with pytest.raises(BundleError, match="is not signed"):
        require_signature(dropped, keys / "public.pem")


# Leaving graphs out


def test_graphs_that_a_target_reads_stay(root: Path) -> None:
    add_target(root, "bound")
    before = content(root)
    with pytest.raises(
        InvalidInput,
        match=r"leaves out graphs and weights that are read when these targets are loaded: openvino\. Keep them, or",
    ):
        strip(root)
    assert content(root) == before


def alone(root: Path) -> Path:
    """The bundle for the fake target alone."""
    add_target(root, "bound")
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["artifacts"] = [one for one in manifest["artifacts"] if one["target"] == "bound"]
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


def test_graphs_that_nobody_reads_are_left_out(root: Path, keys: Path) -> None:
    before = Bundle(alone(root))
    graphs = sizes(before).graphs
    sign(before, keys / "private.pem")
    with pytest.raises(InvalidInput, match="key: is missing"):
        strip(root)
    after, freed = strip(root, Signed(keys / "private.pem"))
    require_signature(after, keys / "public.pem")
    assert freed == graphs > 0 and not (root / "onnx").exists() and not after.graph_files(after.submodel("unet"))
    assert after.manifest.key != before.manifest.key, "another build than with them"
    assert strip(root)[1] == 0
    with pytest.raises(
        BundleError,
        match="has no canonical graphs, which a target is compiled from: build it without --strip-canonical",
    ):
        add_target(root, "bound", signed=Signed(drop=True))


def test_what_was_never_compiled_keeps_its_graph(root: Path) -> None:
    manifest = json.loads((alone(root) / MANIFEST).read_text())
    manifest["artifacts"] = manifest["artifacts"][:1]
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput, match="would leave nothing of vae, of which nothing was compiled"):
        strip(root)


def test_a_target_of_another_program_may_read_them(root: Path) -> None:
    manifest = json.loads((alone(root) / MANIFEST).read_text())
    manifest["artifacts"].append({"target": "abacus", "submodel": "unet"})
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput, match=r"are loaded: abacus\."):
        strip(root)


def test_while_a_bundle_is_built(root: Path, tmp_path: Path) -> None:
    """What a build calls: before anything is compiled, with the targets' settings, and before its files are hashed."""
    as_asked = [Artifact(target="tensorrt-rtx", submodel="unet", key={"weights": "stripped"})]
    with pytest.raises(InvalidInput, match=r"are loaded: tensorrt-rtx\."):
        check_strippable(as_asked, ["unet"])
    check_strippable([Artifact(target="tensorrt-rtx", submodel="unet", key={"context": "9"})], ["unet"])
    bundle = Bundle(alone(root))
    remove_graphs(root, bundle.manifest.submodels, bundle.manifest.artifacts)
    assert not (root / "onnx").exists() and (root / "engines").exists()


# Sizes and targets


def test_sizes(root: Path) -> None:
    bundle, _ = add_target(root, "bound")
    found = sizes(bundle)
    assert found.total == sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert found.targets == {
        "openvino": 0,
        "bound": sum(path.stat().st_size for path in (root / "engines").rglob("*.bound")),
    }
    assert found.apart == found.total + found.rest, "openvino reads the graphs, the other target does not"
    shutil.rmtree(root / "onnx" / "vae")
    with pytest.raises(BundleError, match=r"is damaged: .*vae.* cannot be read"):
        sizes(bundle)


def test_auto_is_every_target_that_can_be_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    found = every_target()
    assert {"onnxruntime", "bound"} <= set(found)
    assert all(
        engine.available().usable or engine.available().compiles for name, engine in targets().items() if name in found
    )
    assert resolve_targets(["bound", "auto"])[0] == "bound" and sorted(resolve_targets(["bound", "auto"])) == sorted(
        found
    )
    assert resolve_targets(["tensorrt"]) == ("tensorrt",)
    assert not {"bound", "onnxruntime"} & set(every_target("fp8")), "they lack the kernels"
    monkeypatch.setattr(export.finished.artifacts, "targets", dict)
    with pytest.raises(
        EngineUnavailable, match="no target can be compiled here for --quant int8: see `enginecast targets`"
    ):
        resolve_targets(["auto"], "int8")
