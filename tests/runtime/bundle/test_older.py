"""Bundles of older schemas load, and say the same in the present one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle.manifest import MANIFEST, SCHEMA, Bundle
from runtime.bundle.precision import Precision
from runtime.errors import BundleError

PART = {
    "name": "unet", "signature": {"inputs": [], "outputs": []}, "graph": "onnx/unet/model.onnx", "nbytes": 3,
    "precision": "int8 + float16 W8A8", "compute": "bfloat16", "keep": ["softmax"],
}  # fmt: skip
OLD: dict[str, Any] = {
    "schema_version": 1, "name": "shapes", "key": "k", "pipeline": "diffusion", "quant": "int8",
    "source": {"name": "s", "family": "f", "architecture": "a", "fingerprint": "0"}, "submodels": [PART],
    "artifacts": [], "config": {}, "versions": {}, "files": {},
}  # fmt: skip


def opened(root: Path, **changes: Any) -> Bundle:
    (root / MANIFEST).write_text(json.dumps(OLD | changes))
    return Bundle(root)


def test_the_label_becomes_fields(tmp_path: Path) -> None:
    bundle = opened(tmp_path)
    found = bundle.submodel("unet")
    weights = ("int8", "float16")
    assert found.precision == Precision(weights=weights, activations="int8", compute="bfloat16")
    assert str(found.precision) == PART["precision"] and found.keep == ("softmax",)
    assert bundle.manifest.schema_version == SCHEMA
    (tmp_path / MANIFEST).write_text(bundle.manifest.model_dump_json())
    assert Bundle(tmp_path).manifest == bundle.manifest, "as the present schema it is read again"


def test_a_source_without_additions(tmp_path: Path) -> None:
    part = PART | {"precision": Precision(weights=("int8",)).model_dump(mode="json")}
    part.pop("compute", None)
    bundle = opened(tmp_path, schema_version=2, task="image", submodels=[part])
    assert (bundle.manifest.schema_version, bundle.manifest.source.additions) == (SCHEMA, ())


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("float32", Precision(weights=("float32",))),
        ("int4 + int8 W4A8", Precision(weights=("int4", "int8"), activations="int8", nested=True)),
        ("fp8 + float16 W8A8", Precision(weights=("fp8", "float16"), activations="fp8")),
        ("", Precision(weights=())),
    ],
)
def test_labels(tmp_path: Path, precision: str, expected: Precision) -> None:
    part = {name: value for name, value in PART.items() if name != "compute"} | {"precision": precision}
    assert opened(tmp_path, submodels=[part]).submodel("unet").precision == expected


def test_the_task_is_that_of_the_pipeline(tmp_path: Path) -> None:
    assert opened(tmp_path).manifest.task == "image"
    assert opened(tmp_path, task="chat").manifest.task == "chat"
    assert opened(tmp_path, pipeline="unheard").manifest.task == ""


def test_activation_ranges_had_another_name(tmp_path: Path) -> None:
    for name in ("activation_ranges", "spans"):
        found = opened(tmp_path, submodels=[PART | {name: {"silu/QuantizeLinear": [-0.25, 4.0]}}]).submodel("unet")
        assert found.activation_ranges == {"silu/QuantizeLinear": (-0.25, 4.0)}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"pipeline": 3}, "pipeline: "),
        ({"submodels": 3}, "submodels: "),
        ({"submodels": [3]}, "submodels.0: "),
        ({"submodels": [PART | {"precision": 3}]}, "submodels.0.precision: "),
        ({"submodels": [PART | {"precision": "int8 & more"}]}, "submodels.0.precision: "),
        ({"submodels": [PART | {"compute": "float8"}]}, "submodels.0.precision: "),
        ({"unheard": 1}, "unheard: "),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(BundleError, match=rf"manifest\.json cannot be read: {fault}"):
        opened(tmp_path, **changes)
