"""Folders of bundles, as they change."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle.manifest import MANIFEST, Bundle
from runtime.errors import BundleError, InvalidInput, NotFound
from runtime.tasks.image import ImageRequest
from serving.host.job import Done
from serving.host.models import ModelHost
from serving.host.offers import Limits, Offer
from serving.host.repository import Changes, Repository
from serving.host.states import ModelState
from tests.fakes.serving import FakeModel, bundle


def names(changes: Changes) -> tuple[list[str], list[str]]:
    return [offer.name for offer in changes.offers], list(changes.gone)


class TestLook:
    def test_models_and_versions(self, tmp_path: Path) -> None:
        for folder in ("draw", "talk/1", "talk/2", "talk/10", "talk/0", "talk/02", "talk/x", ".hidden", "a@b"):
            bundle(tmp_path, folder)
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("")
        changes = Repository(tmp_path).look()
        assert names(changes) == (["talk@10", "talk@2", "talk@1", "draw"], [])
        ten, draw = changes.offers[0], changes.offers[-1]
        assert (ten.model, ten.version, ten.root) == ("talk", "10", tmp_path / "talk" / "10")
        assert (draw.model, draw.version, draw.keep_alive, draw.followed) == ("draw", "", 300, True)

    def test_a_bundle_in_the_folder_hides_what_is_below(self, tmp_path: Path) -> None:
        bundle(tmp_path, "draw")
        bundle(tmp_path, "draw/1")
        assert names(Repository(tmp_path).look()) == (["draw"], [])

    def test_nothing_is_reported_twice(self, tmp_path: Path) -> None:
        bundle(tmp_path, "a")
        repository = Repository(tmp_path)
        assert names(repository.look()) == (["a"], [])
        assert names(repository.look()) == ([], [])
        bundle(tmp_path, "b")
        assert names(repository.look()) == (["b"], [])
        shutil.rmtree(tmp_path / "a")
        assert [names(repository.look()) for _ in range(3)] == [([], []), ([], ["a"]), ([], [])]

    def test_a_bundle_that_is_replaced_is_never_gone(self, tmp_path: Path) -> None:
        bundle(tmp_path, "a")
        repository = Repository(tmp_path)
        repository.look()
        (tmp_path / "a").rename(tmp_path / ".old")
        assert names(repository.look()) == ([], [])
        bundle(tmp_path, "a")
        assert names(repository.look()) == (["a"], [])
        (tmp_path / "a" / MANIFEST).write_text("damaged")
        (offer,) = repository.look().offers
        assert isinstance(offer.error, BundleError)

    def test_what_cannot_be_read_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bundle(tmp_path, "a/1")
        bundle(tmp_path, "b")
        repository = Repository(tmp_path)
        repository.look()
        real = Path.stat

        def stat(path: Path, **options: bool) -> os.stat_result:
            if "a" in path.parts:
                raise PermissionError(13, "Permission denied")
            return real(path, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "stat", stat)
            patched.setattr(Path, "is_dir", lambda path: True)
            assert [names(repository.look()) for _ in range(3)] == [([], [])] * 3
        tmp_path.rename(tmp_path.parent / "elsewhere")
        with pytest.raises(OSError, match="No such file"):
            repository.look()

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="no folder"):
            Repository(tmp_path / "none")
        with pytest.raises(InvalidInput, match="is a bundle"):
            Repository(bundle(tmp_path, "one").root)


class Served:
    """A host that follows a repository of fake models. `made` has the models that were loaded, with their bundles."""

    def __init__(self, root: Path, *named: Offer, versions: dict[str, str] | None = None) -> None:
        self.root = root
        self.made: list[tuple[str, FakeModel]] = []
        self.broken: set[str] = set()
        self.wait = 0.0
        self.host = ModelHost(named, self._load, Limits(grace_seconds=5), versions=versions)

    def _load(self, opened: Bundle, target: str | None) -> FakeModel:
        if opened.manifest.quant in self.broken:
            raise BundleError(f"{opened.manifest.quant} is damaged")
        model = FakeModel()
        self.made.append((f"{opened.root.relative_to(self.root)} {opened.manifest.quant}", model))
        return model

    def write(self, name: str, quant: str = "none") -> None:
        """Put a bundle into the repository, as a build does."""
        opened = bundle(self.root, ".new")
        text = (opened.root / MANIFEST).read_text()
        (opened.root / MANIFEST).write_text(text.replace('"quant":"none"', f'"quant":"{quant}"'))
        if (self.root / name).exists():
            shutil.rmtree(self.root / name)
        (self.root / name).parent.mkdir(exist_ok=True)
        opened.root.rename(self.root / name)

    async def draw(self, name: str) -> str:
        """Run a request and return what was loaded last."""
        async for event in self.host.run(name, ImageRequest("a circle", steps=1), 10):
            last = event
        assert isinstance(last, Done)
        return self.made[-1][0]

    def names(self) -> list[str]:
        return [status.name for status in self.host.statuses()]

    def default(self) -> str:
        (found,) = (status.name for status in self.host.statuses() if status.is_default)
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.host.following.POLL_SECONDS", 0.01)


def follow(served: Served, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        served.host.follow(Repository(served.root))
        try:
            await work()
        finally:
            for _, model in served.made:
                model.release()
            assert await served.host.close(1)
        assert all(model.closed for _, model in served.made)

    asyncio.run(whole())


def test_models_come_and_go(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.write("a")

    async def work() -> None:
        assert served.names() == ["a"] and served.host.ready() == {"a": "image"}
        assert not served.host.at_start() and not served.made
        assert await served.draw("a") == "a none"
        served.write("b")
        await served.until(lambda: served.names() == ["a", "b"])
        await served.draw("b")
        shutil.rmtree(tmp_path / "a")
        await served.until(lambda: served.names() == ["b"])
        with pytest.raises(NotFound):
            await served.draw("a")
        await served.until(lambda: served.made[0][1].closed)

    follow(served, work)


def test_what_cannot_be_served_keeps_nothing_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = "x" * 199
    served = Served(tmp_path)
    served.write(f"{long}/1")

    async def work() -> None:
        assert not served.names() and "is passed over: name: has 201 characters" in caplog.text
        served.write("a")
        await served.until(lambda: served.names() == ["a"])
        tmp_path.rename(tmp_path.parent / "away")
        await served.until(lambda: "its models stay" in caplog.text)
        assert served.names() == ["a"]
        (tmp_path.parent / "away").rename(tmp_path)
        served.write("b")
        await served.until(lambda: served.names() == ["a", "b"])

    follow(served, work)


def test_requests_of_a_model_that_goes_finish(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.write("a")

    async def work() -> None:
        await served.draw("a")
        model = served.made[0][1]
        model.hold()
        drawing = asyncio.create_task(served.draw("a"))
        await served.until(lambda: model.calls == 2)
        shutil.rmtree(tmp_path / "a")
        await served.until(lambda: not served.names())
        assert not model.closed
        model.release()
        await drawing
        await served.until(lambda: model.closed)

    follow(served, work)


def test_a_model_that_goes_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(tmp_path)
    served.write("a")

    async def work() -> None:
        lock, read = asyncio.Event(), asyncio.Event()
        opened = served.host.lifecycle._loading._opened

        async def slowly(one: Any) -> Bundle:
            found = await opened(one)
            read.set()
            await lock.wait()
            return found

        monkeypatch.setattr(served.host.lifecycle._loading, "_opened", slowly)
        drawing = asyncio.create_task(served.draw("a"))
        await read.wait()
        assert served.host.status("a").state is ModelState.LOADING
        shutil.rmtree(tmp_path / "a")
        await served.until(lambda: not served.names())
        lock.set()
        await drawing
        await served.until(lambda: served.made[0][1].closed)

    follow(served, work)


def test_a_new_build_replaces_a_model_that_is_loaded(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.write("a", "int8")

    async def work() -> None:
        assert await served.draw("a") == "a int8"
        served.broken = {"int4"}
        served.write("a", "int4")
        await served.until(lambda: "int4 is damaged" in (served.host.status("a").error or ""))
        assert await served.draw("a") == "a int8", "the one of before goes on"
        served.write("a", "W8A8")
        await served.until(lambda: served.host.status("a").quant == "W8A8")
        assert await served.draw("a") == "a W8A8"
        await served.until(lambda: served.made[0][1].closed)

    follow(served, work)


def test_a_new_build_of_a_model_that_is_not_loaded(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.write("a", "int8")

    async def work() -> None:
        served.write("a", "int4")
        assert await served.draw("a") == "a int4", "the folder counts, not the last look"
        await served.until(lambda: served.host.status("a").quant == "int4")

    follow(served, work)


def test_a_repaired_bundle(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.write("a")
    (tmp_path / "a" / MANIFEST).write_text("damaged")

    async def work() -> None:
        assert served.host.status("a").state is ModelState.FAILED
        served.write("a")
        await served.until(lambda: served.host.status("a").state is ModelState.UNLOADED)
        await served.draw("a")

    follow(served, work)


def test_names_of_the_command_line_come_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "repository"
    own = bundle(tmp_path, "a")
    served = Served(root, Offer.of(own.root))
    served.write("a", "int8")

    async def work() -> None:
        assert served.names() == ["a"] and served.host.status("a").quant == "none"
        assert served.host.at_start() == ["a"] and "is passed over" in caplog.text
        shutil.rmtree(root / "a")
        await asyncio.sleep(0.1)
        assert served.names() == ["a"]

    follow(served, work)


class TestVersions:
    def test_the_highest_is_the_default(self, tmp_path: Path) -> None:
        served = Served(tmp_path)
        for version in ("1", "2", "10"):
            served.write(f"a/{version}")

        async def work() -> None:
            assert served.names() == ["a@1", "a@10", "a@2"] and served.default() == "a@10"
            assert served.host.ready()["a"] == "image"
            assert await served.draw("a") == "a/10 none"
            assert await served.draw("a@1") == "a/1 none"
            assert served.host.status("a").name == "a@10" and served.host.status("a").counts
            shutil.rmtree(tmp_path / "a" / "10")
            await served.until(lambda: "a@10" not in served.names())
            assert served.default() == "a@2"
            with pytest.raises(NotFound, match="did you mean 'a@1'"):
                await served.draw("a@10")
            shutil.rmtree(tmp_path / "a")
            await served.until(lambda: not served.names())
            with pytest.raises(NotFound):
                await served.draw("a")

        follow(served, work)

    def test_a_new_one_is_loaded_before_it_leads(self, tmp_path: Path) -> None:
        served = Served(tmp_path)
        served.write("a/1", "int8")

        async def work() -> None:
            await served.draw("a")
            served.broken = {"int4"}
            served.write("a/2", "int4")
            await served.until(lambda: "a@2" in served.names())
            await served.until(lambda: served.host.status("a@2").state is ModelState.FAILED)
            assert served.default() == "a@1" and await served.draw("a") == "a/1 int8"
            served.write("a/3", "W8A8")
            await served.until(lambda: served.default() == "a@3")
            assert await served.draw("a") == "a/3 W8A8"
            assert served.host.status("a@1").state is ModelState.READY

        follow(served, work)

    def test_one_that_was_chosen_leads(self, tmp_path: Path) -> None:
        served = Served(tmp_path, versions={"a": "2"})
        served.write("a/1")
        served.write("a/3")

        async def work() -> None:
            with pytest.raises(NotFound, match="known: a@1, a@3"):
                await served.draw("a")
            served.write("a/2")
            await served.until(lambda: "a@2" in served.names())
            assert served.default() == "a@2" and await served.draw("a") == "a/2 none"

        follow(served, work)
