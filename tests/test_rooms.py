"""A family, a target, a pipeline and a task are one file each: here they come from tests/toy/ alone, and a bundle is
built of the family for the target, loaded and called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from safetensors.numpy import save_file as numpy_file
from safetensors.torch import save_file

import export.cli.commands
import export.families
import runtime.targets
from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.checkpoint.additions import KINDS, Addition, Kind
from export.cli.additions import with_additions
from export.family import families
from export.report.page import report
from export.report.quality import load_quality
from runtime.bundle.tensors import FILE, open_tensors, read_tensor
from runtime.engine import targets
from runtime.errors import BundleError, InvalidInput, NotFound
from runtime.pipeline import drive
from runtime.placing.loading import load_model
from runtime.task import tasks
from tests.test_tasks import TOY, toy

__all__ = ["toy"]


@pytest.fixture
def rooms(toy: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy's family and target lie in their rooms as well."""
    for package in (export.families, runtime.targets):
        folder = str(TOY / package.__name__.replace(".", "/"))
        monkeypatch.setattr(package, "__path__", [*package.__path__, folder])
    for listed in (families, targets):
        listed.cache_clear()
    yield
    for listed in (families, targets):
        listed.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["ToyForDoubling"], "times": 3}))
    save_file({"factor": torch.tensor([2.0])}, folder / "model.safetensors")
    return folder


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A checkpoint whose matrices together double a number, about."""
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["ToyForWidening"], "times": 3}))
    rng = np.random.default_rng(0)
    up, across = rng.standard_normal((64, 1)), rng.standard_normal((64, 64))
    wide = across @ up
    down = 2 * wide.T / (wide * wide).sum()
    matrices = {"up.weight": up, "across.weight": across, "down.weight": down}
    save_file({name: torch.tensor(one, dtype=torch.float32) for name, one in matrices.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


def test_a_family_and_a_target_are_one_file_each(rooms: None, checkpoint: Path, tmp_path: Path) -> None:
    bundle, _ = build(Options(str(checkpoint), tmp_path / "bundle", ("toy",)))
    manifest = bundle.manifest
    assert (manifest.task, manifest.pipeline, manifest.source.family) == ("scale", "doubling", "toy")
    assert bundle.targets == ("toy",) and manifest.submodels[0].parity is not None
    model = load_model(bundle)
    (scaled,) = drive(model.pipeline(tasks()["scale"].request((1.0, 2.5))), model.engines)
    model.close()
    assert model.target == "toy" and scaled.numbers == (8.0, 20.0)


STORED = {
    "base": {"factor": torch.tensor([2.0]), "offset": torch.tensor([0.25], dtype=torch.bfloat16)},
    "base/adapter": {"factor": torch.tensor([0.5], dtype=torch.float16)},
    "control": {"factor": torch.tensor([-3.0])},
}


@pytest.fixture
def joined(rooms: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A base with its adapter, and beside it a control, which is of a kind that a build adds."""
    monkeypatch.setitem(KINDS, "control", Kind("Folder of a control.", scaled=True))  # type: ignore[arg-type]
    for folder, tensors in STORED.items():
        (tmp_path / folder).mkdir()
        config = {"architectures": ["ToyForJoining"], "times": 2}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / folder / "model.safetensors")
    return tmp_path / "base"


def test_a_submodel_of_several_checkpoints_and_a_tensor_for_the_pipeline(joined: Path, tmp_path: Path) -> None:
    """The bundle has the weights of three folders, and gives what the library's modules give with them."""
    from export.families.joined import Base

    added = Addition("control", tmp_path / "control", scale=0.5)
    bundle, _ = build(Options(str(joined), tmp_path / "bundle", additions=(added,)))
    assert set(open_tensors(bundle.root / FILE)) == {"offset"} and FILE in bundle.manifest.files
    graph = onnx.load(bundle.root / bundle.manifest.submodels[0].graph, load_external_data=False).graph
    assert {one.name for one in graph.initializer} >= {"factor", "adapter.factor", "control.control.factor"}

    base = Base()
    base.load_state_dict({**STORED["base"], "adapter.factor": STORED["base/adapter"]["factor"]})
    with torch.no_grad():
        wanted = torch.tensor([1.0, 2.5]) + STORED["base"]["offset"]
        for _ in range(2):
            wanted = base(wanted) + 0.5 * wanted * STORED["control"]["factor"]
    with closing(load_model(bundle)) as model:
        (scaled,) = drive(model.pipeline(tasks()["scale"].request((1.0, 2.5))), model.engines)
    np.testing.assert_allclose(scaled.numbers, wanted, rtol=1e-6)

    (bundle.root / FILE).write_bytes(b"")
    with pytest.raises(BundleError, match=r"tensors/model.safetensors was altered"):
        load_model(bundle)


def test_what_is_added_is_part_of_what_a_bundle_was_built_from(joined: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Of the manifest, of the fingerprint and of the key: another scale, name or weight makes another build."""
    control = tmp_path / "control"
    makes = [(), (Addition("control", control),), (Addition("control", control, "c", 0.5),)]
    made = [Build.open(Options(str(joined), tmp_path / "bundle", additions=additions)) for additions in makes]
    keys = {one.key for one in made}
    save_file({"factor": torch.tensor([-4.0])}, control / "model.safetensors")
    made.append(Build.open(Options(str(joined), tmp_path / "bundle", additions=makes[1])))
    keys.add(made[3].key)
    assert len({one.fingerprint for one in made}) == len(keys) == len(made)
    assert [(one.kind, one.name, one.scale) for one in made[2].additions] == [("control", "c", 0.5)]

    bundle, _ = build(made[3].options)
    assert bundle.manifest.source.additions == made[3].additions
    with pytest.raises(InvalidInput, match=r"output: .* of another set of additions"):
        build(made[2].options)
    with pytest.raises(InvalidInput, match="control: does not apply to a ToyForDoubling, it takes no additions"):
        build(Options(str(checkpoint), tmp_path / "other", additions=(Addition("control", control),)))
    with pytest.raises(NotFound, match=r"control .*gone does not exist: expected \[NAME=\]PATH\[:SCALE\]"):
        build(Options(str(joined), tmp_path / "other", additions=(Addition("control", tmp_path / "gone"),)))
    with pytest.raises(InvalidInput, match="control: two are named 'control': give one of them another name"):
        Options(str(joined), tmp_path / "other", additions=[Addition("control", control)] * 2)


def test_additions_on_the_command_line_and_in_the_build_file(
    joined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    app = typer.Typer()

    @app.command()
    @with_additions
    def command(source: str, additions: Sequence[Addition] = ()) -> None:
        seen.append((source, *additions))

    app(["x", "--control", "a=control:0.5", "--control", "control"], standalone_mode=False)
    assert seen == [("x", Addition("control", Path("control"), "a", 0.5), Addition("control", Path("control")))]

    built: list[Options] = []
    monkeypatch.setattr("export.cli.commands._build", built.append)
    Path("enginecast.toml").write_text('[[build]]\nsource = "base"\noutput = "out"\ncontrol = ["a=control:0.5"]\n')
    monkeypatch.setattr(sys, "argv", ["enginecast", "build", "--target", "onnxruntime"])
    with pytest.raises(SystemExit):
        export.cli.commands.main()
    assert built[0].additions == (Addition("control", Path("control"), "a", 0.5),), capfd.readouterr().err


def test_a_tensor_that_a_bundle_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensors").mkdir()
    with pytest.raises(BundleError, match=r"model.safetensors cannot be read: .*No such file.*Build the bundle again"):
        read_tensor(tmp_path, "offset")
    numpy_file({"other": np.zeros(2, np.float32)}, tmp_path / FILE)
    with pytest.raises(BundleError, match="it has no float32 tensor offset, only other"):
        read_tensor(tmp_path, "offset")
    np.testing.assert_array_equal(read_tensor(tmp_path, "other"), [0, 0])


def test_a_task_is_quantized_compared_and_reported(rooms: None, wide: Path, tmp_path: Path) -> None:
    """By its own files alone: calibration requests, what is compared, and its part of the report's page."""
    options = Options(str(wide), tmp_path / "bundle", ("onnxruntime",), quant="int8", quality="full")
    bundle, _ = build(options)
    quality = load_quality(bundle)
    assert [len(one.numbers) for one in quality.results["numbers"]] == [8, 8]
    verdict = bundle.manifest.quality
    assert verdict is not None and verdict.figures["numbers_snr_db"] > 20
    report(bundle, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for shown in ("<h2>Numbers</h2>", "8 numbers at int8:", "SNR of the scaled numbers", "What the model scales."):
        assert shown in page
    assert "<h2>Pictures</h2>" not in page and "Perplexity" not in page


def test_they_are_gone_where_the_files_are_not() -> None:
    assert "toy" not in targets() and "ToyForDoubling" not in families() and "scale" not in tasks()
