"""Which of several bundles of one model is loaded: the fastest by figures, else the most exact one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from profiles.rows import append
from runtime.bundle.manifest import MANIFEST, Artifact, Bundle
from runtime.errors import BundleError, InvalidInput, NotFound
from runtime.files import DATA
from runtime.placing.devices import detect
from runtime.placing.fingerprint import Fingerprint
from runtime.placing.loading import load_model
from runtime.placing.measured import Row
from runtime.placing.placement import PlacementOptions
from runtime.placing.variants import chosen
from serving.cli.options import ModelOptions
from serving.cli.repl.about import about
from serving.host.offers import Offer
from serving.host.repository import Repository
from tests.runtime.placing.test_nearest import MANIFEST as PLAIN
from tests.runtime.placing.test_nearest import row

BYTES = {"none": 4, "int8": 2, "int4": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model at three numbers, for both engines of this machine."""
    for quant, nbytes in BYTES.items():
        submodel = PLAIN.submodels[0].model_copy(update={"nbytes": nbytes})
        artifacts = tuple(Artifact(target=target, submodel="unet") for target in ("openvino", "onnxruntime"))
        own = {"name": f"m-{quant}", "quant": quant, "submodels": (submodel,), "artifacts": artifacts}
        write(tmp_path / "m" / quant, **own)
    return tmp_path / "m"


def write(root: Path, **changes: Any) -> None:
    root.mkdir(parents=True)
    (root / MANIFEST).write_text(PLAIN.model_copy(update=changes).model_dump_json())


def figures(**seconds: float) -> list[Row]:
    """A figure of each of these, by "numbers_target", on this machine."""
    return [
        here(target, value, bundle=f"m-{quant}", quant=quant)
        for (quant, target), value in ((tuple(name.split("_")), value) for name, value in seconds.items())
    ]


def here(target: str, value: float, **changes: Any) -> Row:
    machine = detect()
    return row(target, value, fingerprint=Fingerprint.of(machine), threads=machine.allowed.threads, **changes)


@pytest.mark.parametrize(
    ("seconds", "wanted", "quant", "words"),
    [
        ({}, None, "none", "the most exact bundle, beside int8, int4: the figures of two"),
        ({"int8_openvino": 1.0}, None, "none", "the most exact bundle"),
        ({"none_openvino": 3.0, "int8_openvino": 2.0, "int4_openvino": 1.0}, None, "int4", "int4 before int8, none"),
        ({"int8_openvino": 1.04, "int4_openvino": 1.0}, None, "int8", "int8 before int4: measured 1.04 against 1 s"),
        ({"int8_openvino": 2.0, "int4_onnxruntime": 1.0}, None, "int4", "measured 1 against 2 s for a picture on"),
        ({"int8_openvino": 2.0, "none_openvino": 3.0, "int4_onnxruntime": 1.0}, "openvino", "int8", "int8 before none"),
        ({"int8_openvino": 2.0, "int4_tensorrt": 1.0}, None, "none", "the most exact bundle"),
    ],
    ids=["no figures", "one figure", "the fastest", "nearly as fast", "on best targets", "on a target", "unusable"],
)  # fmt: skip
def test_one_is_chosen(
    folder: Path, tmp_path: Path, seconds: dict[str, float], wanted: str | None, quant: str, words: str
) -> None:
    append(tmp_path / "rows.jsonl", figures(**seconds))
    found = chosen(folder, wanted, PlacementOptions(rows=(tmp_path / "rows.jsonl",)))
    assert (found.bundle.root, found.bundle.manifest.quant) == (folder / quant, quant)
    assert found.decision is not None and found.decision.value == f"m-{quant}"
    assert found.decision.reason.startswith(words) or words in found.decision.reason


def test_options_choose_before_the_first_look(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal shows of a folder is what it loads on the target that was asked for."""
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    rows = figures(int8_openvino=2.0, none_openvino=3.0, int4_onnxruntime=1.0)
    append(tmp_path / "data" / "rows" / "own.jsonl", rows)
    for target, quant in ((None, "int4"), ("openvino", "int8")):
        where = ModelOptions(bundle=str(folder), target=target)
        assert where.opened(str(folder)).manifest.quant == quant
        assert about(where)()["quantization"] == quant


def test_what_is_no_folder_of_variants(folder: Path, tmp_path: Path) -> None:
    assert chosen(folder / "int8").decision is None, "a bundle itself"
    for path, error in ((tmp_path / "none", NotFound), (tmp_path, BundleError)):
        with pytest.raises(error):
            chosen(path)
    write(folder / "other", source=PLAIN.source.model_copy(update={"fingerprint": "x", "name": "else"}))
    with pytest.raises(InvalidInput, match=r"holds bundles of several models \(int4 of s, .*other of else"):
        chosen(folder)


def test_in_a_repository(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It has one name; figures choose what is served by it. New bundles beside it count, versions go before."""
    monkeypatch.setenv(DATA, str(folder.parent / "data"))
    append(folder.parent / "data" / "rows" / "own.jsonl", figures(none_openvino=3.0, int8_openvino=2.0))
    shutil.move(folder / "int8", folder.parent / "kept")
    repository = Repository(folder.parent)
    served = {offer.name: offer for offer in repository.look().offers}
    assert served["m"].quant == "none" and served["m"].root == folder / "none"
    assert not repository.look().offers
    shutil.move(folder.parent / "kept", folder / "int8")
    with caplog.at_level(logging.INFO):
        (offer,) = repository.look().offers
    assert (offer.name, offer.quant, offer.followed) == ("m", "int8", True)
    assert "model m: m-int8 is served, int8 before none: measured 2 against 3 s" in caplog.text
    assert Offer.of(folder).name == "m", "its name does not depend on what is chosen"
    write(folder / "3", name="three")
    assert [offer.name for offer in repository.look().offers] == ["m@3"]


def test_the_chosen_one_is_loaded(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two bundles that differ in the label of their numbers."""
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    one, folder = Bundle(tiny_bundle).manifest, tmp_path / "model"
    for quant in ("none", "int8"):
        shutil.copytree(tiny_bundle, folder / quant)
        manifest = json.loads((folder / quant / MANIFEST).read_text()) | {"quant": quant, "name": quant}
        (folder / quant / MANIFEST).write_text(json.dumps(manifest))
    append(
        tmp_path / "data" / "rows" / "own.jsonl",
        [
            here("onnxruntime", value, metric=metric, bundle=quant, quant=quant, source=one.source.name)
            for quant, value in {"none": 2.0, "int8": 1.0}.items()
            for metric in ("first_token", "decode")
        ],
    )
    model = load_model(folder, "onnxruntime")
    assert model.bundle.root == folder / "none", "its answer of 64 tokens takes 34 s, that of the other 65 s"
    assert all(engine.decisions["bundle"].value == "none" for engine in model.engines.values())
    model.close()
