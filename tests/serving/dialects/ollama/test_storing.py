"""Changes of a repository with Ollama's own Python client, unchanged."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ollama import Client, ResponseError

from runtime.bundle.manifest import MANIFEST, Bundle
from runtime.errors import InvalidInput, NotFound
from serving.dialects.ollama.stores import Stores
from serving.host import building
from serving.host.repository import Repository
from serving.settings import Settings
from tests.fakes.proofs import proves
from tests.fakes.serving import FakeServer, bundle, until
from tests.fakes.web import send, serve
from tests.serving.dialects.ollama.conftest import Served

BUILD = """
import os, sys, time
source, output = sys.argv[1], sys.argv[sys.argv.index("--output") + 1]
print(" ".join(sys.argv[2:]).replace(output, "OUT"), flush=True)
print("[ 1/2] unet             graph                    0.1 s  ETA      1 s", flush=True)
if "slow" in source:
    open(source + ".pid", "w").write(str(os.getpid()))
    time.sleep(60)
if "bad" in source:
    print("enginecast: quant: 'int3' is not known", file=sys.stderr)
    sys.exit(2)
print("[ 2/2] unet             check                    0.1 s  ETA      0 s", flush=True)
import shutil
shutil.copytree(source, output)
"""


def filled(folder: Path, name: str, **files: bytes) -> Path:
    """A bundle with files, named for their hashes in its manifest."""
    root = bundle(folder, name).root
    manifest = json.loads((root / MANIFEST).read_text())
    for file, content in files.items():
        (root / "onnx").mkdir(exist_ok=True)
        (root / "onnx" / file).write_bytes(content)
        manifest["files"][f"onnx/{file}"] = hashlib.sha256(content).hexdigest()
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


@contextmanager
def storing(folder: Path, **settings: Any) -> Iterator[Served]:
    """A server with a repository."""
    repository = folder / "repository"
    repository.mkdir()
    with FakeServer(folder / "bundles") as fake:

        async def follow() -> None:
            fake.host.follow(Repository(repository))

        fake.do(follow())
        server = serve(fake, settings=Settings(repository=repository, **settings))
        try:
            with Client(f"http://127.0.0.1:{server.port}") as client:
                yield Served(fake, server, client, [])
        finally:
            fake.do(server.stop())


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


@proves("POST /api/pull", "model", "name", "stream")
def test_pull(tmp_path: Path) -> None:
    library = tmp_path / "library"
    filled(library, "shapes/1", a=b"old")
    source = filled(library, "shapes/2", a=b"x" * 1000, b=b"y")
    with storing(tmp_path, library=library) as served:
        steps = list(served.client.pull("shapes", stream=True))
        assert steps[0].status == "pulling manifest" and steps[-1].status == "success"
        digest = hashlib.sha256(b"x" * 1000).hexdigest()
        of_a = [step for step in steps if step.digest == f"sha256:{digest}"]
        assert [(step.completed, step.total) for step in of_a] == [(0, 1000), (1000, 1000)]
        found = Bundle(tmp_path / "repository" / "shapes" / "2")
        found.verify()
        assert found.content == Bundle(source).content
        assert served.fake.host.status("shapes").version == "2", "it is there at once"
        assert served.client.pull("shapes:2").status == "success", "and may be pulled again"
        assert served.post("/api/pull", {"name": "shapes:1", "insecure": True, "stream": False})[1] == {
            "status": "success"
        }
        assert served.fake.host.status("shapes@1").name == "shapes@1"
        with pytest.raises(ResponseError, match="there is no 'shape' in the library: did you mean 'shapes'"):
            served.client.pull("shape")
        with pytest.raises(ResponseError, match=r"there is no '\.\./library/shapes' in the library"):
            served.client.pull("../library/shapes")
        assert hidden(tmp_path / "repository") == []


@proves("POST /api/push", "model", "name", "stream")
def test_push(tmp_path: Path) -> None:
    library = tmp_path / "library"
    filled(library, "shapes/1", a=b"x" * 1000)
    with storing(tmp_path, library=library) as served:
        served.client.pull("shapes")
        served.client.copy("shapes:1", "mine:3")
        steps = list(served.client.push("mine:3", stream=True))
        assert steps[0].status == "pushing manifest" and steps[-1].status == "success"
        assert [(step.completed, step.total) for step in steps[1:-1]] == [(0, 1000), (1000, 1000)]
        found = Bundle(library / "mine" / "3")
        found.verify()
        assert found.content == Bundle(library / "shapes" / "1").content
        assert served.client.push("mine:3").status == "success", "and may be pushed again"
        body = {"name": "shapes", "insecure": True, "stream": False}
        assert served.post("/api/push", body) == (200, {"status": "success"})
        filled(library, "draw", a=b"another")
        with pytest.raises(ResponseError, match="'draw' is there already"):
            served.client.push("draw")
        with pytest.raises(ResponseError, match="model 'shape' is not served here: did you mean 'shapes'"):
            served.client.push("shape")
        assert hidden(library) == []


def test_an_altered_bundle_is_not_pulled(tmp_path: Path) -> None:
    root = filled(tmp_path / "library", "shapes", a=b"x" * 1000)
    (root / "onnx" / "a").write_bytes(b"z" * 1000)
    filled(tmp_path / "library", "halves", a=b"x")
    (tmp_path / "library" / "halves" / "onnx" / "a").unlink()
    with storing(tmp_path, library=tmp_path / "library") as served:
        with pytest.raises(ResponseError, match="was altered: copy or build its bundle again"):
            list(served.client.pull("shapes", stream=True))
        with pytest.raises(ResponseError) as caught:
            served.client.pull("halves")
        assert str(tmp_path) not in str(caught.value) and caught.value.status_code == 404
        assert list((tmp_path / "repository").iterdir()) == []


@proves("POST /api/copy", "source", "destination")
@proves("DELETE /api/delete", "model", "name")
def test_copy_and_delete(tmp_path: Path) -> None:
    with storing(tmp_path) as served:
        assert served.client.copy("draw", "mine").status == "success"
        assert served.client.copy("draw:latest", "many:1").status == "success"
        served.client.copy("mine", "many:2")
        assert served.client.generate("mine", "x").image is not None
        names = [model.model for model in served.client.list().models]
        assert names == ["draw:latest", "many:1", "many:2", "many:latest", "mine:latest", "talk:latest"]
        for source, to, why in (
            ("draw", "mine", "'mine' is there already: delete it first"),
            ("draw", "mine:3", "'mine' is there already"),
            ("draw", "many", "'many' is there already"),
            ("draw", "many:2", "'many' is there already"),
            ("draw", "new:x", "has the tag 'x', expected a version from 1 on"),
            ("draw", "../new", "cannot be that of a folder"),
            ("draw", ".new", "cannot be that of a folder"),
            ("draw", "a@b", "has the tag 'b'"),
            ("drow", "new", "model 'drow' is not served here"),
        ):
            with pytest.raises(ResponseError, match=why):
                served.client.copy(source, to)
        with pytest.raises(ResponseError, match="many has several versions: name one"):
            served.client.delete("many")
        assert served.client.delete("many:1").status == "success"
        assert served.post("/api/show", {"name": "many:1"})[0] == 404, "it is gone at once"
        served.client.delete("many")
        assert send(served.server, "/api/delete", {"name": "mine"}, "DELETE")[0].status == 200
        assert list((tmp_path / "repository").iterdir()) == []
        with pytest.raises(ResponseError, match="draw was named when the server started"):
            served.client.delete("draw")
        with pytest.raises(ResponseError, match="model 'mine' is not served here"):
            served.client.delete("mine")


def test_a_model_is_deleted_with_all_its_quants(tmp_path: Path) -> None:
    with storing(tmp_path) as served:
        for quant in ("int8", "int4"):
            manifest = bundle(tmp_path / "repository" / "several", quant).root / MANIFEST
            fields = json.loads(manifest.read_text())
            fields["source"]["name"] = "several"
            manifest.write_text(json.dumps(fields | {"quant": quant}))
        served.fake.do(served.fake.host.look())
        assert served.client.delete("several").status == "success"
        assert list((tmp_path / "repository").iterdir()) == []
        assert served.post("/api/show", {"name": "several"})[0] == 404


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of checkpoints, and a build that copies them."""
    script = tmp_path / "build.py"
    script.write_text(BUILD)
    monkeypatch.setattr(building, "COMMAND", (sys.executable, str(script)))
    for name in ("good", "bad", "slow"):
        filled(tmp_path / "checkpoints", name)
    return tmp_path / "checkpoints"


@proves("POST /api/create", "model", "name", "from", "quantize", "stream")
def test_create(tmp_path: Path, checkpoints: Path) -> None:
    with storing(tmp_path, checkpoints=checkpoints) as served:
        steps = list(served.client.create("new:1", from_="good", quantize="int8", stream=True))
        assert [(step.completed, step.total) for step in steps] == [(1, 2), (2, 2), (None, None)]
        assert steps[0].status is not None and steps[0].status.startswith("unet             graph")
        assert steps[-1].status == "success" and served.fake.host.status("new").version == "1"
        assert served.post("/api/create", {"name": "other", "from": "good", "stream": False})[1] == {
            "status": "success"
        }
        for model, source, why in (
            ("worse", "bad", "quant: 'int3' is not known"),
            ("new:1", "good", "'new' is there already"),
            ("none", "../checkpoints/good", "there is no '../checkpoints/good' among the checkpoints"),
            ("none", str(checkpoints / "good"), "among the checkpoints"),
        ):
            with pytest.raises(ResponseError, match=why):
                served.client.create(model, from_=source)
        for field, value in (("system", "x"), ("template", "x"), ("files", {"a": "b"}), ("parameters", {"seed": 1})):
            status, content = served.post("/api/create", {"model": "x", "from": "good", field: value})
            assert status == 400 and content["error"].startswith(f"{field}: ")


def test_leaving_stops_a_build(tmp_path: Path, checkpoints: Path) -> None:
    body = json.dumps({"model": "new", "from": "slow"}).encode()
    with storing(tmp_path, checkpoints=checkpoints) as served:
        with socket.create_connection(("127.0.0.1", served.server.port)) as connection:
            head = f"POST /api/create HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            until(lambda: (checkpoints / "slow.pid").is_file() and bool((checkpoints / "slow.pid").read_text()))
            with pytest.raises(ResponseError, match="another bundle is being built"):
                served.client.create("second", from_="good")
        process = Path("/proc") / (checkpoints / "slow.pid").read_text()
        until(lambda: not process.exists())
        until(lambda: served.post("/api/create", {"model": "third", "from": "good", "stream": False})[0] == 200)


def test_without_folders(served: Served) -> None:
    for call, why in (
        (lambda: served.client.pull("x"), "this server has no --library"),
        (lambda: served.client.push("draw"), "this server has no --library"),
        (lambda: served.client.copy("draw", "x"), "this server has no --repository"),
        (lambda: served.client.delete("draw"), "this server has no --repository"),
        (lambda: served.client.create("x", from_="y"), "this server has no --checkpoints"),
    ):
        with pytest.raises(ResponseError, match=why):
            call()


def test_settings_that_do_not_fit(served: Served, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="library: is where bundles of a repository come from"):
        Stores(served.fake.host, Settings(library=tmp_path))
    with pytest.raises(NotFound, match=r"there is no folder .*nowhere"):
        Stores(served.fake.host, Settings(repository=tmp_path, checkpoints=tmp_path / "nowhere"))


def test_a_build_that_ignores_its_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "build.py"
    ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    script.write_text(f"{ignoring}\nprint('[ 1/1] a', flush=True)\ntime.sleep(60)")
    monkeypatch.setattr(building, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(building, "GRACE", 0.3)

    async def leave() -> None:
        steps = building.built(tmp_path, tmp_path / "out", "x")
        assert (await anext(steps)).text == "a"
        await steps.aclose()

    asyncio.run(leave())


@pytest.mark.full
def test_create_builds(tmp_path: Path, tiny_diffusion: Path) -> None:
    """With the real build, and a mistake that it finds."""
    with storing(tmp_path, checkpoints=tiny_diffusion.parent) as served:
        with pytest.raises(ResponseError, match="int3") as caught:
            served.client.create("tiny", from_=tiny_diffusion.name, quantize="int3")
        assert caught.value.status_code == 400 and str(tmp_path) not in str(caught.value)
        steps = list(served.client.create("tiny", from_=tiny_diffusion.name, stream=True))
        numbers = [step.completed or 0 for step in steps[:-1]]
        assert steps[-1].status == "success" and numbers == sorted(numbers), "a long step is told several times"
        assert {*numbers} == {*range(1, (steps[0].total or 0) + 1)}
        assert served.client.show("tiny").capabilities == ["image"]
        Bundle(tmp_path / "repository" / "tiny").verify()
