"""Opening and verifying bundles: whatever is wrong with one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import MANIFEST, SCHEMA, Bundle, sha256
from runtime.errors import BundleError, NotFound

SIGNATURE = {"inputs": [{"name": "x", "dtype": "float32", "dims": [1]}], "outputs": []}
PART = {"name": "unet", "signature": SIGNATURE, "graph": "onnx/unet/model.onnx", "precision": "float16", "nbytes": 3}


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    """The manifest of a bundle of one file, which lies in `tmp_path`."""
    file = tmp_path / "onnx" / "unet" / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"abc")
    return {
        "schema_version": SCHEMA,
        "name": "shapes",
        "key": "k",
        "pipeline": "diffusion",
        "quant": "none",
        "source": {"name": "s", "family": "f", "architecture": "a", "fingerprint": "0"},
        "submodels": [PART],
        "artifacts": [{"target": target, "submodel": "unet"} for target in ("openvino", "onnxruntime", "openvino")],
        "config": {},
        "versions": {},
        "files": {"onnx/unet/model.onnx": sha256(file)},
    }


def opened(root: Path, manifest: dict[str, Any]) -> Bundle:
    (root / MANIFEST).write_text(json.dumps(manifest))
    return Bundle(root)


def test_open(tmp_path: Path, manifest: dict[str, Any]) -> None:
    bundle = opened(tmp_path, manifest)
    assert bundle.name == "shapes" and bundle.targets == ("openvino", "onnxruntime")
    assert bundle.submodel("unet").signature.inputs[0].name == "x"
    bundle.verify()
    with pytest.raises(NotFound, match=r"has no submodel 'unett': did you mean 'unet'\?"):
        bundle.submodel("unett")


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        Bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"is no bundle: it has no manifest\.json"):
        Bundle(tmp_path)


@pytest.mark.parametrize("version", [0, None, "1", 0.5])
def test_another_schema_version(tmp_path: Path, manifest: dict[str, Any], version: object) -> None:
    with pytest.raises(BundleError, match=f"has schema version {version}, this program reads {SCHEMA}: build the bundle again"):
        opened(tmp_path, manifest | {"schema_version": version, "something": "new"})


@pytest.mark.parametrize(
    ("versions", "wanted"),
    [
        ({"enginecast": "0.3.0"}, "install enginecast 0.3.0 or later, or build the bundle again with this one"),
        ({"enginecast": [1]}, "install a later enginecast, or"),
        ("none", "install a later enginecast, or"),
    ],
)
def test_a_newer_schema_says_what_reads_it(tmp_path: Path, manifest: dict[str, Any], versions: object, wanted: str) -> None:
    with pytest.raises(BundleError, match=f"has schema version {SCHEMA + 1}, this program reads {SCHEMA}: {wanted}"):
        opened(tmp_path, manifest | {"schema_version": SCHEMA + 1, "versions": versions})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": 1}', b"[" * 100_000])
def test_a_damaged_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match="manifest"):
        Bundle(tmp_path)


@pytest.mark.parametrize("change", [{"unheard": 1}, {"submodels": 3}, {"submodels": [PART | {"nbytes": "many"}]}])
def test_a_manifest_of_another_form(tmp_path: Path, manifest: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        opened(tmp_path, manifest | change)


@pytest.mark.parametrize("path", ["/etc/passwd", "../elsewhere/model.onnx", "onnx/../../x"])
@pytest.mark.parametrize("where", ["graph", "files", "artifact", "folder"])
def test_a_manifest_that_points_out_of_its_folder(tmp_path: Path, manifest: dict[str, Any], path: str, where: str) -> None:
    artifact = {"target": "openvino", "submodel": "unet"}
    change = {
        "files": {"files": {path: "0"}},
        "graph": {"submodels": [PART | {"graph": path}]},
        "artifact": {"artifacts": [artifact | {"files": [path]}]},
        "folder": {"artifacts": [artifact | {"folder": path}]},
    }[where]
    with pytest.raises(BundleError, match="cannot be read"):
        opened(tmp_path, manifest | change)


def test_verify_names_every_fault(tmp_path: Path, manifest: dict[str, Any]) -> None:
    (tmp_path / "added.txt").write_text("?")
    (tmp_path / "onnx" / "unet" / "model.onnx").write_bytes(b"abd")
    bundle = opened(tmp_path, manifest | {"files": manifest["files"] | {"tokenizer/vocab.json": "0"}})
    with pytest.raises(BundleError) as caught:
        bundle.verify()
    message = str(caught.value)
    assert "onnx/unet/model.onnx was altered" in message
    assert "tokenizer/vocab.json is missing" in message
    assert "added.txt is not in the manifest" in message


def test_what_is_of_a_graph_and_what_was_compiled_of_it(tmp_path: Path, manifest: dict[str, Any]) -> None:
    files = manifest["files"] | {"onnx/unet/weights.safetensors": "0", "onnx/unet/other/x": "0", "engines/openvino/unet.onnx": "0"}
    added = [{"target": "openvino", "submodel": "unet", "key": {"sdk": "2"}}, {"target": "openvino", "submodel": "vae"}]
    bundle = opened(tmp_path, manifest | {"files": files, "artifacts": [manifest["artifacts"][0], *added]})
    assert bundle.graph_files(bundle.submodel("unet")) == ("onnx/unet/model.onnx", "onnx/unet/weights.safetensors")
    assert [artifact.key for artifact in bundle.artifacts("openvino", "unet")] == [{}, {"sdk": "2"}]
    assert not bundle.artifacts("onnxruntime", "unet")


def test_links_to_nowhere_are_strangers(tmp_path: Path, manifest: dict[str, Any]) -> None:
    (tmp_path / "engines").symlink_to(tmp_path / "nowhere")
    bundle = opened(tmp_path, manifest)
    bundle.verify(strangers=False)
    with pytest.raises(BundleError, match="engines is not in the manifest"):
        bundle.verify()


def test_a_folder_in_the_place_of_a_file(tmp_path: Path, manifest: dict[str, Any]) -> None:
    bundle = opened(tmp_path, manifest | {"files": {"onnx": "0", "onnx/unet/model.onnx/x": "0"}})
    with pytest.raises(BundleError, match=r"onnx cannot be read .*; onnx/unet/model\.onnx/x is missing"):
        bundle.verify()
