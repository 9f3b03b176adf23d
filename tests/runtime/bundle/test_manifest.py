"""Opening and verifying bundles: whatever is wrong with one is named."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import runtime.bundle.manifest
from runtime.bundle.manifest import MANIFEST, OLDEST_SCHEMA, SCHEMA, Bundle, _digest, sha256
from runtime.errors import BundleError, NotFound
from runtime.files import open_regular

SIGNATURE = {"inputs": [{"name": "x", "dtype": "float32", "dims": [1]}], "outputs": []}
PART = {
    "name": "unet",
    "signature": SIGNATURE,
    "graph": "onnx/unet/model.onnx",
    "precision": {"weights": ["float16"]},
    "nbytes": 3,
}


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
        "task": "image",
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


@pytest.mark.parametrize("version", [0, None, "1", 0.5, True, 1.0])
def test_another_schema_version(tmp_path: Path, manifest: dict[str, Any], version: object) -> None:
    with pytest.raises(
        BundleError, match=f"has schema version {version}, this program reads {OLDEST_SCHEMA} to {SCHEMA}: build"
    ):
        opened(tmp_path, manifest | {"schema_version": version, "something": "new"})


@pytest.mark.parametrize(
    ("versions", "wanted"),
    [
        (
            {"enginecast": "0.3.0"},
            "Install the enginecast that built it, 0.3.0, or a later one, or build the bundle again",
        ),
        ({"enginecast": [1]}, "Install its enginecast or a later one, or"),
        ("none", "Install its enginecast or a later one, or"),
    ],
)
def test_a_newer_schema_says_what_reads_it(
    tmp_path: Path, manifest: dict[str, Any], versions: object, wanted: str
) -> None:
    expected = (
        f"has schema version {SCHEMA + 1}, this program reads {OLDEST_SCHEMA} to {SCHEMA}: it was built by a newer"
    )
    with pytest.raises(BundleError, match=f"{expected} enginecast. {wanted}"):
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
def test_a_manifest_that_points_out_of_its_folder(
    tmp_path: Path, manifest: dict[str, Any], path: str, where: str
) -> None:
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


def test_files_are_hashed_beside_one_another(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    files = manifest["files"] | {"tokenizer.json": sha256(tmp_path / "tokenizer.json")}
    bundle, both, digest = opened(tmp_path, manifest | {"files": files}), threading.Barrier(2), _digest

    def together(file: BinaryIO) -> str:
        both.wait(5)
        return digest(file)

    monkeypatch.setattr(runtime.bundle.manifest, "_digest", together)
    bundle.verify()


def test_what_is_of_a_graph_and_what_was_compiled_of_it(tmp_path: Path, manifest: dict[str, Any]) -> None:
    files = manifest["files"] | {
        "onnx/unet/weights.safetensors": "0",
        "onnx/unet/other/x": "0",
        "engines/openvino/unet.onnx": "0",
    }
    added = [{"target": "openvino", "submodel": "unet", "key": {"sdk": "2"}}, {"target": "openvino", "submodel": "vae"}]
    changes = {"submodels": [PART, PART | {"name": "vae"}], "artifacts": [manifest["artifacts"][0], *added]}
    bundle = opened(tmp_path, manifest | {"files": files} | changes)
    assert bundle.graph_files(bundle.submodel("unet")) == ("onnx/unet/model.onnx", "onnx/unet/weights.safetensors")
    assert [artifact.key for artifact in bundle.artifacts("openvino", "unet")] == [{}, {"sdk": "2"}]
    assert not bundle.artifacts("onnxruntime", "unet")


def test_links_to_nowhere_are_unknown_files(tmp_path: Path, manifest: dict[str, Any]) -> None:
    (tmp_path / "engines").symlink_to(tmp_path / "nowhere")
    bundle = opened(tmp_path, manifest)
    bundle.verify(unknown=False)
    with pytest.raises(BundleError, match="engines is not in the manifest"):
        bundle.verify()


def test_a_folder_in_the_place_of_a_file(tmp_path: Path, manifest: dict[str, Any]) -> None:
    bundle = opened(tmp_path, manifest | {"files": {"onnx": "0", "onnx/unet/model.onnx/x": "0"}})
    with pytest.raises(BundleError, match=r"onnx cannot be read .*; onnx/unet/model\.onnx/x is missing"):
        bundle.verify()


# What a manifest may say


@pytest.mark.parametrize(
    "name",
    [
        "",
        " shapes",
        "two\nlines",
        "\x1b[31mred",
        "nul\x00",
        "\u202egnp.exe",
        "zero\u200bwidth",
        "line\u2028",
        "\ud800",
        "x" * 201,
    ],
)
def test_names_that_cannot_be_shown(tmp_path: Path, manifest: dict[str, Any], name: str) -> None:
    with pytest.raises(BundleError, match="cannot be read") as caught:
        opened(tmp_path, manifest | {"name": name})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"quant": "int8\n"},
        {"source": {"name": "a\x07", "family": "f", "architecture": "a", "fingerprint": "0"}},
        {"versions": {"enginecast": "1\x1b[0m"}},
        {"submodels": [PART | {"name": "u/net"}]},
        {"submodels": [PART | {"name": ".."}]},
        {"submodels": [PART | {"precision": "\u2066int8"}]},
        {"submodels": [PART | {"nbytes": "3"}]},
        {"submodels": [PART | {"nbytes": True}]},
        {"submodels": [PART | {"nbytes": -1}]},
        {"submodels": [PART, PART]},
        {"artifacts": [{"target": "openvino", "submodel": "vae"}]},
        {"artifacts": [{"target": "../openvino", "submodel": "unet"}]},
        {"artifacts": [{"target": "openvino", "submodel": "unet", "key": {"a": "b\x00"}}]},
        {"files": {"onnx//unet/model.onnx": "0"}},
        {"files": {"onnx/./unet/model.onnx": "0"}},
        {"files": {"onnx/" + "x" * 256: "0"}},
        {"files": {"a\nb": "0"}},
        {"files": {"nul\x00": "0"}},
        {"files": {"\udcff": "0"}},
        {"files": {MANIFEST: "0"}},
    ],
)
def test_a_manifest_that_says_what_cannot_be(tmp_path: Path, manifest: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read: .* Build the bundle again") as caught:
        opened(tmp_path, manifest | change)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("put", "why"),
    [
        ('{"name": "other", ', "'name' stands in it twice"),
        ('{"config": {"a": NaN}, "more": ', "NaN is no number"),
        ('{"more": -Infinity, ', "-Infinity is no number"),
        ('{"more": 1e999, ', "1e999 is too large a number"),
        ('{"more": ' + "9" * 5000 + ", ", "digits"),
        ('{"more": ' + "[" * 100_000 + "]" * 100_000 + ", ", "nested too deeply"),
        ('\ufeff{"more": 1, ', "BOM"),
    ],
)
def test_json_that_readers_take_differently(tmp_path: Path, manifest: dict[str, Any], put: str, why: str) -> None:
    (tmp_path / MANIFEST).write_text(put + json.dumps(manifest)[1:], encoding="utf-8")
    with pytest.raises(BundleError, match=why):
        Bundle(tmp_path)


def test_a_manifest_is_read_only_up_to_its_limit(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk, and would not fit the memory
    with pytest.raises(BundleError, match="cannot be read: it has more than 16,777,216 bytes"):
        Bundle(tmp_path)


# What lies in the place of files


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))  # names of sockets are short


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "put",
    [put_pipe, put_socket, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)],
)
@pytest.mark.parametrize("name", [MANIFEST, "onnx/unet/model.onnx", "tokenizer/vocab.json"])
def test_only_regular_files_are_opened(
    tmp_path: Path, manifest: dict[str, Any], put: Callable[[Path], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / MANIFEST).write_text(
        json.dumps(manifest | {"files": manifest["files"] | ({} if name == MANIFEST else {name: "0"})})
    )
    (tmp_path / name).unlink(missing_ok=True)
    put(tmp_path / name)
    with pytest.raises(BundleError, match=r"cannot be read|is damaged"):
        Bundle(tmp_path).verify(unknown=False)


def test_what_loading_would_open_must_be_listed(tmp_path: Path, manifest: dict[str, Any]) -> None:
    artifact = {"target": "onnxruntime", "submodel": "unet", "files": ["unet.onnx"], "folder": "8a"}
    names = (
        "onnx/unet/weights.safetensors",
        "engines/onnxruntime/8a/unet.onnx",
        "engines/onnxruntime/8a/unet.json",
        "tokenizer/added_tokens.json",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    for name in ("notes.txt", "quality/page.html", "engines/onnxruntime/9b/unet.onnx"):  # which loading does not open
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    with pytest.raises(BundleError) as caught:
        opened(tmp_path, manifest | {"artifacts": [artifact]}).verify(unknown=False)
    assert all(f"{name} is not in the manifest" in str(caught.value) for name in names)
    assert "notes" not in str(caught.value) and "page" not in str(caught.value) and "9b" not in str(caught.value)
    with pytest.raises(BundleError, match=r"onnx/unet/model\.onnx is not in the manifest"):
        opened(tmp_path, manifest | {"files": {}}).verify(unknown=False)


def test_a_graph_beside_the_manifest(tmp_path: Path, manifest: dict[str, Any]) -> None:
    (tmp_path / "g").write_bytes(b"?")
    with pytest.raises(BundleError, match=r"damaged: g is not in the manifest\."):
        opened(tmp_path, manifest | {"submodels": [PART | {"graph": "g"}]}).verify(unknown=False)


def test_compiled_files_that_are_not_there_and_not_listed(tmp_path: Path, manifest: dict[str, Any]) -> None:
    artifact = {"target": "onnxruntime", "submodel": "unet", "files": ["unet.onnx"]}
    with pytest.raises(
        BundleError, match=r"engines/onnxruntime/unet\.onnx, which is read when it is loaded, is not in the manifest"
    ):
        opened(tmp_path, manifest | {"artifacts": [artifact]}).verify()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_that_lead_out_of_the_bundle(tmp_path: Path, manifest: dict[str, Any], what: str) -> None:
    root, graph = tmp_path / "bundle", tmp_path / "onnx" / "unet" / "model.onnx"
    (root / "onnx").mkdir(parents=True)
    if what == "folder":
        (root / "onnx" / "unet").symlink_to(graph.parent)
    else:
        (root / "onnx" / "unet").mkdir()
        (root / "onnx" / "unet" / "model.onnx").symlink_to(graph)
    with pytest.raises(BundleError, match=r"onnx/unet/model\.onnx is a link that leads out of the bundle"):
        opened(root, manifest).verify(unknown=False)


def entry(location: str) -> bytes:
    """A ModelProto with one tensor, in a subgraph of a node, whose data lies there: the value stands before the key, as
    is allowed.
    """

    def field(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    external = field(13, field(2, location.encode()) + field(1, b"location"))
    return field(7, field(1, field(5, field(6, field(5, external)))))


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../../../etc/passwd", "w/../../x", "weights.bin", "", "a\\b", "C:x"]
)
def test_a_graph_whose_weights_are_not_listed(tmp_path: Path, manifest: dict[str, Any], location: str) -> None:
    graph = tmp_path / "onnx" / "unet" / "model.onnx"
    graph.write_bytes(entry(location))
    with pytest.raises(BundleError, match=r"model\.onnx has weights in '.*', which is not in the manifest"):
        opened(tmp_path, manifest | {"files": {"onnx/unet/model.onnx": sha256(graph)}}).verify(unknown=False)


def test_a_graph_whose_weights_are_listed(tmp_path: Path, manifest: dict[str, Any]) -> None:
    graph, weights = tmp_path / "onnx" / "unet" / "model.onnx", tmp_path / "onnx" / "unet" / "weights.safetensors"
    graph.write_bytes(entry(weights.name))
    weights.write_bytes(b"w")
    opened(
        tmp_path, manifest | {"files": {f"onnx/unet/{path.name}": sha256(path) for path in (graph, weights)}}
    ).verify()
    graph.write_bytes(entry(weights.name) + b"\xff")
    with pytest.raises(BundleError, match="it is no ONNX graph"):
        opened(
            tmp_path, manifest | {"files": {f"onnx/unet/{path.name}": sha256(path) for path in (graph, weights)}}
        ).verify()


# What changes after it was verified


def test_what_changed_since_is_compared_again(
    tmp_path: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tmp_path / "onnx" / "unet" / "model.onnx"
    bundle = opened(tmp_path, manifest)
    bundle.verify(unknown=False)
    hashed: list[Path] = []
    monkeypatch.setattr(runtime.bundle.manifest, "open_regular", lambda path: hashed.append(path) or open_regular(path))
    bundle.verify_again()
    assert not hashed
    graph.touch()
    bundle.verify_again()
    assert hashed == [graph]
    before = graph.stat()
    graph.write_bytes(b"abd")
    os.utime(graph, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same length, and as old
    with pytest.raises(BundleError, match=r"model\.onnx was altered"):
        bundle.verify_again()
    graph.write_bytes(b"abc")
    bundle.verify_again()
    opened(tmp_path, manifest | {"pipeline": "chat"})
    with pytest.raises(BundleError, match="holds another bundle than the one that was opened"):
        bundle.verify_again()
