"""A family, a target, a pipeline and a task are one file each: here they come from tests/toy/ alone, and a bundle is
built of the family for the target, loaded and asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import export.families
import runtime.targets
from export.build.build import build
from export.build.options import Options
from export.family import families
from runtime.engine import targets
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


def test_a_family_and_a_target_are_one_file_each(rooms: None, checkpoint: Path, tmp_path: Path) -> None:
    bundle, _ = build(Options(str(checkpoint), tmp_path / "bundle", ("toy",)))
    manifest = bundle.manifest
    assert (manifest.task, manifest.pipeline, manifest.source.family) == ("scale", "doubling", "toy")
    assert bundle.targets == ("toy",) and manifest.submodels[0].parity is not None
    model = load_model(bundle)
    (scaled,) = drive(model.pipeline(tasks()["scale"].request((1.0, 2.5))), model.engines)
    model.close()
    assert model.target == "toy" and scaled.numbers == (8.0, 20.0)


def test_they_are_gone_where_the_files_are_not() -> None:
    assert "toy" not in targets() and "ToyForDoubling" not in families() and "scale" not in tasks()
