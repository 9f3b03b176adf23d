"""What fits this machine is found or compiled, once, whatever happens meanwhile."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import runtime.placing.portable
from runtime.bundle.manifest import MANIFEST, SCHEMA, Artifact, Bundle, Submodel, sha256
from runtime.engine import CompileOptions, Options, targets
from runtime.errors import Cancelled, EngineError, EngineUnavailable, ResourceExhausted
from runtime.placing.portable import Fitted, fitting
from tests.fakes.bound import Bound

SIGNATURE = {"inputs": [{"name": "x", "dtype": "float32", "dims": [1]}], "outputs": []}
GRAPH = "onnx/unet/model.onnx"
COMPILE = """
import sys
from pathlib import Path
from runtime.bundle.manifest import Bundle
from tests.fakes.bound import Bound
from runtime.placing.portable import fitting
class Slow(Bound):
    seconds = float(sys.argv[2])
bundle = Bundle(Path(sys.argv[1]))
found = fitting(bundle, bundle.submodel("unet"), Slow, lambda share, phase: print(phase, flush=True))
print("found", found.compiled.folder, flush=True)
"""


def make(root: Path, *artifacts: Artifact, content: bytes = b"graph", graph: bool = True) -> Bundle:
    """A bundle of one submodel on disk."""
    files = {}
    for name, data in ((GRAPH, content), ("onnx/unet/weights.safetensors", b"w")) if graph else ():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
        files[name] = sha256(root / name)
    part = {"name": "unet", "signature": SIGNATURE, "graph": GRAPH, "precision": {"weights": ["float16"]}, "nbytes": 3}
    manifest = {
        "schema_version": SCHEMA, "name": "shapes", "key": "k", "pipeline": "diffusion", "task": "image",
        "quant": "none",
        "source": {"name": "s", "family": "f", "architecture": "a", "fingerprint": "0"}, "submodels": [part],
        "artifacts": [artifact.model_dump() for artifact in artifacts], "config": {}, "versions": {}, "files": files,
    }  # fmt: skip
    root.mkdir(exist_ok=True)
    (root / MANIFEST).write_text(json.dumps(manifest))
    return Bundle(root)


def held(here: str, **settings: str) -> Artifact:
    return Artifact(target="bound", submodel="unet", files=("unet.bound",), key={"here": here}, settings=settings)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path / "bundle")


def fit(bundle: Bundle, engine: type[Bound] = Bound, **settings: str) -> Fitted:
    return fitting(bundle, bundle.submodel("unet"), engine, settings=settings)


def text(fitted: Fitted, engine: type[Bound] = Bound) -> str:
    """What the engine that was found says of how it was compiled."""
    loaded = engine.load(Submodel.model_validate(PART), Path("nowhere"), Options(compiled=fitted.compiled))
    return bytes(loaded.run({})["text"]).decode()


PART = {"name": "unet", "signature": SIGNATURE, "graph": GRAPH, "precision": {"weights": ["float16"]}, "nbytes": 3}


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def test_the_bundle_s_own_is_taken_where_it_fits(tmp_path: Path, cache: Path) -> None:
    bundle = make(tmp_path / "b", held("elsewhere"), held("this machine"), held("nowhere"))
    found = fit(bundle)
    assert (
        found.compiled.artifact == held("this machine") and found.compiled.folder == bundle.root / "engines" / "bound"
    )
    assert not found.note and not cache.exists()
    added = held("this machine").model_copy(update={"folder": "3fa1"})
    assert (
        fit(make(tmp_path / "added", held("nowhere"), added)).compiled.folder == tmp_path / "added/engines/bound/3fa1"
    )


@pytest.mark.parametrize("artifacts", [(), (held("elsewhere"),), (held("elsewhere"), held("elsewhere"))], ids=len)
def test_what_does_not_fit_is_compiled_here_once(tmp_path: Path, cache: Path, artifacts: tuple[Artifact, ...]) -> None:
    bundle = make(tmp_path / "b", *artifacts)
    before = {path: path.stat().st_mtime_ns for path in bundle.root.rglob("*")}
    first, second = fit(bundle), fit(bundle)
    assert first.compiled == second.compiled and first.compiled.folder.parent == cache
    assert text(second).startswith(sha256(bundle.root / GRAPH))
    why = "one was compiled for elsewhere, and here is this machine" if artifacts else "bundle shapes holds none"
    assert first.note.startswith(f"bound engine of unet: {why}") and "compiled here in" in first.note
    assert f"compiled here before, taken from {first.compiled.folder}" in second.note
    assert {path: path.stat().st_mtime_ns for path in bundle.root.rglob("*")} == before, (
        "nothing is written into the bundle"
    )
    assert entries(cache) == [first.compiled.folder.name]


def test_whatever_matters_makes_another(
    tmp_path: Path, cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Bound):
        here = "that machine"

    found = [fit(bundle), fit(bundle, Other), fit(bundle, shapes="small")]
    found.append(fit(make(tmp_path / "altered", content=b"another graph")))
    found.append(fit(make(tmp_path / "settings", held("elsewhere", context="9"))))
    monkeypatch.setattr(runtime.placing.portable, "processor_features", lambda: ("ABACUS",))
    found.append(fit(bundle))
    assert len({fitted.compiled.folder for fitted in found}) == len(found) == len(entries(cache))
    assert "{'shapes': 'small'}" in text(found[2]) and "{'context': '9'}" in text(found[4]), (
        "as the bundle's own was compiled"
    )
    assert text(found[1], Other).endswith("that machine")


def test_progress_is_reported_and_may_stop_it(bundle: Bundle, cache: Path) -> None:
    shares: list[float] = []

    def listen(share: float, phase: str) -> None:
        shares.append(share)
        if share == 0.5:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        fitting(bundle, bundle.submodel("unet"), Bound, listen)
    assert shares == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5] and not entries(cache)
    assert text(fit(bundle))


def test_without_canonical_graphs_nothing_is_compiled(tmp_path: Path, cache: Path) -> None:
    assert not fit(make(tmp_path / "fits", held("this machine"), graph=False)).note
    message = r"no bound engine of unet fits here \(one was compiled for elsewhere.*made with --strip-canonical. "
    message += r"Build it with --target bound"
    with pytest.raises(EngineUnavailable, match=message):
        fit(make(tmp_path / "stripped", held("elsewhere"), graph=False))
    assert not cache.exists()


# What may be wrong with the cache


@pytest.mark.parametrize("damage", ["altered", "truncated", "absent", "entry", "no entry", "emptied", "foreign"])
def test_a_damaged_entry_is_compiled_again(bundle: Bundle, cache: Path, damage: str) -> None:
    folder = fit(bundle).compiled.folder
    file, entry = folder / "unet.bound", folder / "entry.json"
    wanted = file.read_bytes()
    content = json.loads(entry.read_text())
    if damage in ("altered", "truncated"):
        file.write_bytes(wanted[:-1] + (b"?" if damage == "altered" else b""))
    elif damage == "absent":
        file.unlink()
    elif damage == "no entry":
        entry.unlink()
    else:
        content["artifact"]["key"] = {"here": "elsewhere" if damage == "foreign" else "this machine"}
        content["files"] = {} if damage == "emptied" else content["files"]
        entry.write_text("{" if damage == "entry" else json.dumps(content))
    found = fit(bundle)
    assert "kept in" in found.note and "again, since the" in found.note
    assert found.compiled.folder == folder and file.read_bytes() == wanted and entries(cache) == [folder.name]
    assert "compiled here before" in fit(bundle).note


@pytest.mark.parametrize("path", ["../../escaped", "/etc/passwd"])
def test_an_entry_that_points_out_of_its_folder(bundle: Bundle, path: str) -> None:
    entry = fit(bundle).compiled.folder / "entry.json"
    content = json.loads(entry.read_text())
    content["artifact"]["files"], content["files"] = [path], {path: "0"}
    entry.write_text(json.dumps(content))
    assert "could not be read" in fit(bundle).note


@pytest.mark.skipif(os.name != "posix", reason="other systems have other rights")
@pytest.mark.parametrize("which", ["entry", "engines"])
def test_what_others_may_have_written_is_refused(bundle: Bundle, cache: Path, which: str) -> None:
    folder = fit(bundle).compiled.folder
    (folder if which == "entry" else cache).chmod(0o777)
    with pytest.raises(
        EngineError,
        match=r"other users can write .*, and engines are native code: remove it, or set ENGINECAST_CACHE",
    ):
        fit(bundle)
    (folder if which == "entry" else cache).chmod(0o700)
    assert "compiled here before" in fit(bundle).note


def test_a_cache_that_cannot_be_written(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        ResourceExhausted, match=r"cannot write .*file/engines, .*: Not a directory\. Set ENGINECAST_CACHE"
    ):
        fit(bundle)


def failing(number: int) -> type[Bound]:
    class Failing(Bound):
        @classmethod
        def compile_with(cls, options: CompileOptions, submodel: Submodel, graph: Path, output: Path) -> Artifact:
            super().compile_with(options, submodel, graph, output)
            raise OSError(number, os.strerror(number))

    return Failing


def test_a_full_disk(bundle: Bundle, cache: Path) -> None:
    with pytest.raises(
        ResourceExhausted, match=r"the disk of .*engines is full: free some space there, or set ENGINECAST_CACHE"
    ):
        fit(bundle, failing(errno.ENOSPC))
    with pytest.raises(EngineError, match=r"could not compile unet for bound: .*Input/output error"):
        fit(bundle, failing(errno.EIO))
    assert not entries(cache)


def test_what_fits_nowhere_is_not_kept(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bound, "misfit", lambda artifact: "is of no use")
    with pytest.raises(
        EngineError, match="the bound engine of unet does not fit where it was compiled: it is of no use"
    ):
        fit(bundle)
    assert not entries(cache)


# Processes


def start(bundle: Bundle, seconds: float) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE, str(bundle.root), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_a_killed_compilation_leaves_nothing(bundle: Bundle, cache: Path) -> None:
    with start(bundle, 60) as process:
        assert process.stdout.readline() == "Sliding beads\n" and len(entries(cache)) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 120
    while entries(cache) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not entries(cache)
    assert "compiled here in" in fit(bundle).note, "nothing stays locked"


def test_what_a_lost_machine_left_is_removed(bundle: Bundle, cache: Path) -> None:
    (cache / ".compiling-lost").mkdir(parents=True, mode=0o700)
    cache.chmod(0o700)
    (cache / ".compiling-lost" / "unet.bound").write_text("half")
    assert entries(cache) == [".compiling-lost"]
    assert entries(cache.parent / "engines") and fit(bundle).compiled.folder.name in entries(cache)
    assert len(entries(cache)) == 1


def test_of_two_processes_one_compiles(bundle: Bundle, cache: Path) -> None:
    with start(bundle, 1.5) as first, start(bundle, 1.5) as second:
        outputs = [process.communicate()[0].splitlines() for process in (first, second)]
    assert first.returncode == second.returncode == 0
    assert outputs[0][-1] == outputs[1][-1] == f"found {cache / entries(cache)[0]}"
    compiling = [lines for lines in outputs if "Sliding beads" in lines]
    assert len(compiling) == 1, "the other waits, or comes when it is done"


# Real targets


def test_a_decoder_for_onnx_runtime_is_lowered_here(tiny_bundle: Path, cache: Path) -> None:
    """What the bundle was not built for at all: its weights stay where they are."""
    opened = Bundle(tiny_bundle)
    opened.manifest = opened.manifest.model_copy(update={"artifacts": ()})
    decoder = opened.submodel("decoder")
    found = fitting(opened, decoder, targets()["onnxruntime"])
    assert "bundle tiny-vlm holds none" in found.note and found.compiled.artifact.files == ("decoder.onnx",)
    lowered = found.compiled.folder / "decoder.onnx"
    assert b"GroupQueryAttention" in lowered.read_bytes() and lowered.stat().st_size < decoder.nbytes
    assert "compiled here before" in fitting(opened, decoder, targets()["onnxruntime"]).note


def test_engines_that_cannot_run_here_are_not_made_in_vain(tiny_bundle: Path, cache: Path) -> None:
    engine = targets()["tensorrt-rtx"]
    if engine.available().usable or not engine.available().compiles:
        pytest.skip("a GPU is here, or no TensorRT for RTX")
    opened = Bundle(tiny_bundle)
    with pytest.raises(
        EngineError,
        match="engine of token_embedding does not fit where it was compiled: it cannot run here: there is no",
    ):
        fitting(opened, opened.submodel("token_embedding"), engine)
    assert not entries(cache)
