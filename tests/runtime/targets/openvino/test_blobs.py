"""Models that were compiled for the processor are kept where the user says how much, and answer as before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime.bundle.manifest import Bundle
from runtime.engine import Options
from runtime.errors import InvalidInput
from runtime.placing.memory import sample
from runtime.targets.openvino.blobs import VARIABLE, prune
from runtime.targets.openvino.engine import OpenVINO


def test_a_blob_is_read_again(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINECAST_CACHE", str(tmp_path))
    submodel, folder = Bundle(tiny_bundle).submodel("vision_encoder"), tmp_path / "openvino-cpu"
    inputs = sample(submodel.signature)

    def outputs() -> dict[str, bytes]:
        engine = OpenVINO.load(submodel, tiny_bundle, Options())
        found = {name: array.tobytes() for name, array in engine.run(inputs).items()}
        engine.close()
        return found

    expected = outputs()
    assert not folder.exists(), "nothing is kept unless the user says so"
    monkeypatch.setenv(VARIABLE, "1GiB")
    assert outputs() == expected
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.blob")}
    assert made and folder.stat().st_mode & 0o077 == 0
    assert outputs() == expected
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.blob")} == made, "it was read, not made anew"
    monkeypatch.setenv(VARIABLE, "1B")
    assert outputs() == expected and not list(folder.glob("*.blob"))
    monkeypatch.setenv(VARIABLE, "much")
    with pytest.raises(InvalidInput, match=f"{VARIABLE}: is 'much', expected a size"):
        outputs()


def test_what_was_used_longest_ago_is_removed(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "used", "old")):
        path = tmp_path / f"{name}.blob"
        path.write_bytes(b"12345")
        os.utime(path, (1000 - age, 1000 - age))
    os.utime(tmp_path / "used.blob", (2000, 500))
    (tmp_path / "other").write_bytes(b"123456789")
    prune(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.blob", "other", "used.blob"]
    prune(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "used.blob"]
