"""What Ollama's own Python client lists, and what it shows of a model."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from ollama import ResponseError

from runtime.bundle.manifest import MANIFEST
from serving.dialects.ollama.names import known, shown
from serving.host.offers import Offer
from serving.host.repository import Repository
from tests.fakes.proofs import proves
from tests.fakes.serving import bundle
from tests.serving.dialects.ollama.conftest import Served


def follow(own: Served, folder: Path) -> None:
    """Serve the bundles of a folder, too."""

    async def begin() -> None:
        own.fake.host.follow(Repository(folder))

    own.fake.do(begin())


@proves("GET /api/tags")
def test_tags(own: Served, tmp_path: Path) -> None:
    for version in ("1", "2"):
        bundle(tmp_path / "repository", f"shapes/{version}")
    follow(own, tmp_path / "repository")
    found = {model.model: model for model in own.client.list().models}
    assert list(found) == ["draw:latest", "shapes:1", "shapes:2", "shapes:latest", "talk:latest"]
    newest, manifest = found["shapes:2"], tmp_path / "repository" / "shapes" / "2" / MANIFEST
    assert newest.digest == found["shapes:latest"].digest == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert newest.modified_at == datetime.fromtimestamp(manifest.stat().st_mtime, UTC)
    assert newest.size == 0 and newest.details is not None
    assert (newest.details.family, newest.details.format, newest.details.quantization_level) == (
        "fake",
        "enginecast",
        "none",
    )


@proves("GET /api/ps")
def test_ps(own: Served) -> None:
    assert list(own.client.ps().models) == []
    object.__setattr__(own.fake.host.catalog.find("talk").offer, "keep_alive", 300.0)
    for name in ("draw", "talk"):
        own.client.generate(name, "x", keep_alive="10m")
    draw, talk = own.client.ps().models
    assert (draw.model, talk.model, talk.name) == ("draw:latest", "talk:latest", "talk:latest")
    assert draw.expires_at is not None and draw.expires_at.year == 9999, "it always stays"
    left = (talk.expires_at or datetime.now(UTC)) - datetime.now(UTC)
    assert timedelta(seconds=590) < left <= timedelta(seconds=600)
    assert talk.size is not None and talk.size > 0 and talk.size_vram == 0


@proves("POST /api/show", "model", "name")
def test_show(served: Served) -> None:
    found = served.client.show("draw:latest")
    assert found.capabilities == ["image"] and found.details is not None and found.details.family == "fake"
    assert found.modelinfo is not None and found.modelinfo["general.architecture"] == "Fake"
    assert found.modified_at is not None and found.parameters == ""
    assert served.post("/api/show", {"name": "talk", "verbose": True})[1]["capabilities"] == ["completion"]
    with pytest.raises(ResponseError, match="model 'drow' is not served here: did you mean 'draw'"):
        served.client.show("drow")
    assert served.post("/api/show", {}) == (400, {"error": "model: is missing, and is required"})


def test_names(served: Served) -> None:
    host = served.fake.host
    assert [known(host, name) for name in ("talk", "talk:latest", "talk:2")] == ["talk", "talk", "talk@2"]
    assert shown(Offer("talk@2", Path("x"), version="2"), True) == ["talk:2", "talk:latest"]
    assert shown(Offer("talk@2", Path("x"), version="2"), False) == ["talk:2"]


def test_a_bundle_that_cannot_be_opened(own: Served, tmp_path: Path) -> None:
    bundle(tmp_path / "repository", "broken")
    (tmp_path / "repository" / "broken" / MANIFEST).write_text("{")
    follow(own, tmp_path / "repository")
    found = {model.model: model for model in own.client.list().models}
    assert "broken:latest" in found and own.client.show("broken").capabilities == []
